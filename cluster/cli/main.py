"""The `roclip` command. What a command needs is imported when it runs, so that `--help` is quick."""

import os
import platform
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from cluster.cli import jobs
from cluster.cli.config import CONFIG_EXAMPLES, config
from cluster.cli.dashboard import DASHBOARD_EXAMPLES, dashboard
from cluster.cli.doctor import DOCTOR_EXAMPLES, doctor
from cluster.cli.options import ConfigPath, DryRun, Overrides, examples, resolve, show_dry_run
from cluster.cli.poison import POISON_EXAMPLES, poison
from cluster.cli.render import RENDER_EXAMPLES, render
from cluster.cli.segmenter import SEGMENTER_EXAMPLES, train_segmenter
from cluster.oracle.request import OracleRequest
from roclip.config import Config, environment_defaults, run_directory
from roclip.config.secrets import refuse_secret
from roclip.errors import CheckpointError, ConfigError, RoclipError, without_space

EXIT_CODES = """\
[bold]Exit codes[/]

 0    done (for [bold]oracle[/] and [bold]run[/] whatever the verdict, unless oracle.fail_on is set)\n
 1    unexpected error, with a traceback\n
 2    a key, a value or the command line is wrong\n
 3    URL list, shard or sample cannot be used\n
 4    checkpoint incomplete, altered, of another model, or not trusted\n
 5    another process works in this run directory\n
 6    training cannot go on: a value is not finite, or the ranks disagree\n
 7    a stage could not be finished, or machine or cluster lack something ([bold]doctor[/])\n
 10   oracle: suspicious, with oracle.fail_on=suspicious\n
 20   oracle: poisoned, with oracle.fail_on=suspicious or poisoned\n
 21   the same, but repaired, checked again and trusted\n
 30   oracle: inconclusive, with oracle.fail_on=suspicious\n
 130  stopped by Ctrl-C (also a job, by [bold]stop[/]; [bold]submit[/] and [bold]logs[/]: detached from the job)
"""
INTERRUPTED = 130
VERDICT_CODES = {"suspicious": 10, "poisoned": 20, "inconclusive": 30}
REPAIRED_CODE = 21
FAILS_ON = {"suspicious": ("suspicious", "inconclusive", "poisoned"), "poisoned": ("poisoned",)}
_NOT_TRUSTED = "The oracle has not called it clean: run `roclip oracle`, read its report, or take --untrusted."
_USAGE_ERROR = (
    typer.BadParameter.__base__ or Exception
)  # typer does not export it, and newer ones bring their own click

app = typer.Typer(
    name="roclip",
    help="Pretrain CLIP on web data that somebody may have poisoned: URL lists to a trusted checkpoint.",
    epilog=EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(
    epilog=examples(
        "run configs/demo.yaml",
        "run configs/demo.yaml pool.size=4096 train.lr=1e-3 --dry-run",
        "run runs/2026-01-31-demo",
        "run configs/laion.yaml data.urls='urls/*.parquet' --address auto",
    )
)
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(metavar="auto|IP:PORT", help="On a node of a Ray cluster: run there; sets cluster.address.")
    ] = "",
    dry_run: DryRun = False,
) -> int:
    """Run the whole system: ingest, train meanwhile, evaluate, check with the oracle, report.

    Running the same config again resumes where it stopped.
    """
    settings = resolve(config, [*(overrides or ()), *([f"cluster.address={address}"] if address else [])])
    if dry_run:
        return show_dry_run(settings, "run")
    typer.echo(f"start    process {os.getpid()} on {platform.node()}")  # the libraries take seconds to load
    return _finish(settings, _pipeline().run(settings))


@app.command(
    epilog=examples(
        "ingest configs/demo.yaml",
        "ingest configs/web.yaml data.urls=urls/*.parquet data.shards=/data/shards",
        "ingest configs/web.yaml ingest.max_in_flight=8 --dry-run",
    )
)
def ingest(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> int:
    """Fetch URL lists into sealed shards with a manifest. Running it again fetches only what is missing."""
    settings = resolve(config, overrides)
    if dry_run:
        return show_dry_run(settings, "ingest")
    from cluster.ingest.stage import ingest_only

    return _finish(settings, ingest_only(settings))


@app.command(
    epilog=examples(
        "train configs/demo.yaml",
        "train configs/web.yaml data.shards=/data/shards cluster.workers=8 cluster.gpus_per_worker=1",
        "train configs/demo.yaml 'arms=[clip]' --dry-run",
    )
)
def train(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> int:
    """Train every arm on shards that were ingested before, from the newest checkpoint if there is one."""
    settings = resolve(config, overrides)
    return show_dry_run(settings, "train") if dry_run else _finish(settings, _pipeline().train_only(settings))


@app.command(
    epilog=examples(
        "evaluate runs/2026-01-31-demo",
        "evaluate runs/2026-01-31-demo evaluate.webdataset=sets/cifar10",
        "evaluate configs/demo.yaml --checkpoint downloads/model",
    )
)
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="DIR", help="Checkpoint, or exported model, to measure.")
    ] = None,
    dry_run: DryRun = False,
) -> int:
    """Measure the newest checkpoints: zero-shot, linear probe, retrieval, attack success."""
    settings = resolve(config, overrides)
    if dry_run:
        return show_dry_run(settings, "evaluate")
    return _finish(settings, _pipeline().evaluate_only(settings, checkpoint))


@app.command(
    epilog=examples(
        "oracle runs/2026-01-31-demo",
        "oracle runs/2026-01-31-demo --repair",
        "oracle runs/2026-01-31-demo oracle.fail_on=suspicious",
        "oracle runs/2026-01-31-demo --checkpoint step-00000500",
        "oracle my.yaml --checkpoint downloads/model --data photos.parquet --out report",
    )
)
def oracle(
    config: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str,
        typer.Option(metavar="DIR|STEP", help="A step of the run, or any folder with open_clip weights."),
    ] = "",
    data: Annotated[
        str, typer.Option(metavar="DATA", help="Shards, tars, a parquet, or a folder of images with a .txt each.")
    ] = "",
    truth: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="poison.parquet with the true victims, to measure those that are named."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the report.")] = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="Work in this process, without Ray.")] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Repair a checkpoint that is found poisoned or suspicious, and check it again."),
    ] = False,
    dry_run: DryRun = False,
) -> int:
    """Check checkpoints against a segmentation network that never saw the crawled data."""
    settings = resolve(config, [*(overrides or ()), *(["repair.enabled=true"] if repair else [])])
    request = OracleRequest(checkpoint, data, truth, out, in_process)
    for option, value in (("--data", data), ("--checkpoint", checkpoint)):  # the report names both
        refuse_secret(option, value)
    if dry_run:
        return show_dry_run(settings, "oracle")
    return _finish(settings, _pipeline().oracle_only(settings, request))


@app.command(
    epilog=examples(
        "compare configs/experiments/fashion.yaml",
        "compare configs/experiments/fashion.yaml 'seeds=[0]' train.epochs=4 --dry-run",
        "compare configs/experiments/cifar10.yaml 'points=[n8,n40,n160]' arms.paper.set.pool.match_every=3",
    )
)
def compare(
    experiment: Annotated[
        Path, typer.Argument(metavar="EXPERIMENT", help="A preset with seeds, arms and a sweep (YAML).")
    ],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> int:
    """Train several arms on the same poisoned data with several seeds, and write one report.

    Running it again resumes where it stopped; another seed, arm or point trains only what is new.
    """
    from roclip.report.experiment import load_experiment

    settings = load_experiment(experiment, overrides or ())
    if dry_run:
        from cluster.train.compare_plan import show_experiment

        show_experiment(Console(), settings)
        return 0
    from cluster.train.compare import compare as run_comparison

    folder = run_comparison(settings, shlex.join(["roclip", "compare", str(experiment), *(overrides or ())]))
    Console().print((folder / "table.md").read_text(), markup=False, highlight=False, soft_wrap=True)
    for name in ("compare.html", "compare.json"):
        typer.echo(f"{name.split('.')[1]:<8} {folder / name}")
    return 0


@app.command(
    epilog=examples(
        "export runs/2026-01-31-demo --out model",
        "export configs/demo.yaml --arm clip --untrusted --out model",
        "export runs/2026-01-31-demo/roclip/checkpoints/step-00000500 --out model",
    )
)
def export(
    target: Annotated[
        Path,
        typer.Argument(metavar="CONFIG|RUN|CHECKPOINT", help="A preset, a run directory or one checkpoint."),
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write; required.")] = None,
    arm: Annotated[str, typer.Option(help="Arm to take; without it, the last of `arms`.")] = "",
    untrusted: Annotated[
        bool,
        typer.Option("--untrusted", help="Take the newest checkpoint, although the oracle has not called it clean."),
    ] = False,
    dry_run: DryRun = False,
) -> int:
    """Write a TRUSTED checkpoint as safetensors for open_clip ('local-dir:DIR'); any other is refused."""
    if out is None:
        raise ConfigError("export: expected --out DIR, got none. Name the folder to write.")
    if (target / "open_clip_config.json").is_file():
        settings, checkpoint = None, target
        if overrides:
            raise ConfigError(f"export: a checkpoint takes no overrides, got {' '.join(overrides)}. Leave them out.")
    else:
        settings = resolve(target, overrides)
        checkpoint = pointed_checkpoint(settings, arm, "LATEST" if untrusted else "TRUSTED")
    if not untrusted:
        require_trust(checkpoint)
    if dry_run:
        if settings is not None:
            show_dry_run(settings, "export")
        typer.echo(f"would export {checkpoint} to {out}")
        return 0
    from roclip.checkpoint import checkpoint as checkpoints

    written = checkpoints.export(checkpoint, out)
    typer.echo(f"wrote {written}; open_clip.create_model_and_transforms('local-dir:{written}') loads it")
    return 0


app.command(epilog=CONFIG_EXAMPLES)(config)
app.command(epilog=DOCTOR_EXAMPLES)(doctor)
app.command(epilog=POISON_EXAMPLES)(poison)
app.command(epilog=DASHBOARD_EXAMPLES)(dashboard)
app.command(epilog=RENDER_EXAMPLES)(render)
app.command(epilog=SEGMENTER_EXAMPLES)(train_segmenter)
app.command(epilog=jobs.SUBMIT_EXAMPLES)(jobs.submit)
app.command(epilog=jobs.STATUS_EXAMPLES)(jobs.status)
app.command(epilog=jobs.LOGS_EXAMPLES)(jobs.logs)
app.command(epilog=jobs.STOP_EXAMPLES)(jobs.stop)
app.command(epilog=jobs.RUNS_EXAMPLES)(jobs.runs)


def pointed_checkpoint(config: Config, arm: str, pointer: str) -> Path:
    """The checkpoint that an arm's LATEST or TRUSTED names. Raises `CheckpointError` if there is none."""
    arm = arm or config.arms[-1]
    if arm not in config.arms:
        raise ConfigError(f"--arm: expected one of {', '.join(config.arms)}, got {arm!r}.")
    folder = run_directory(config) / arm / "checkpoints"
    if not (folder / "LATEST").is_file():
        raise CheckpointError(f"{folder}: expected a checkpoint, got none. Train first: `roclip run`.")
    if not (folder / pointer).is_file():
        raise CheckpointError(f"{folder}: expected {pointer}, got none. {_NOT_TRUSTED}")
    return folder / (folder / pointer).read_text().strip()


def require_trust(checkpoint: Path) -> None:
    """Raises `CheckpointError` unless the TRUSTED beside a checkpoint names it."""
    pointer = checkpoint.resolve().parent / "TRUSTED"
    trusted = pointer.read_text().strip() if pointer.is_file() else "none"
    if trusted != checkpoint.resolve().name:
        raise CheckpointError(f"{checkpoint}: expected a trusted checkpoint, got one that is not. {_NOT_TRUSTED}")


def verdict_code(config: Config, summary: dict[str, Any]) -> int:
    """The exit code (0, 10, 20, 21 or 30) that `oracle.fail_on` gives the verdict on the last arm, which is the one to ship."""
    arms = summary.get("arms") or {}
    ordered = [*(arm for arm in arms if arm not in config.arms), *(arm for arm in config.arms if arm in arms)]
    shipped = arms[ordered[-1]] if ordered else {}
    oracle = shipped.get("oracle") or {}
    verdict = str(oracle.get("verdict"))
    if verdict not in FAILS_ON.get(config.oracle.fail_on, ()):
        return 0
    return REPAIRED_CODE if (oracle.get("repair") or {}).get("accepted") else VERDICT_CODES[verdict]


def main() -> None:
    """Run the command and end with its exit code; our own errors are one line, others a traceback."""
    environment_defaults()
    code = guarded(sys.argv[1:] or ["--help"])
    if code == INTERRUPTED:
        _complain("stopped by Ctrl-C; the same command goes on from here")
    sys.exit(code)


def guarded(arguments: list[str]) -> int:
    """Run a command line and return its exit code; report errors on stderr."""
    try:
        return app(arguments, prog_name="roclip", standalone_mode=False) or 0
    except RoclipError as error:
        _complain(str(error))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except typer.Exit as error:
        return error.exit_code
    except Exception as error:
        if isinstance(error, OSError) and (told := without_space(error)) is not None:
            _complain(str(told))
            return told.exit_code
        if isinstance(error, _USAGE_ERROR):
            say = getattr(error, "format_message", error.__str__)
            _complain(f"{say()} See `roclip --help`.")
            return ConfigError.exit_code
        traceback.print_exc()
        return 1


def _complain(message: str) -> None:
    line = Text.assemble(("error: ", "bold red"), (" ".join(message.split()), "red"))
    Console(stderr=True).print(line, soft_wrap=True, highlight=False)


def _pipeline() -> Any:
    from cluster import pipeline

    return pipeline


def _finish(config: Config, result: dict[str, Any]) -> int:
    from cluster.summary import show_summary

    show_summary(Console(), result, run_directory(config))
    return verdict_code(config, result)
