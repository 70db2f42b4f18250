"""The `roclip` command: help, overrides, dry runs and exit codes, mostly as a process of its own."""

import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import REPOSITORY, TINY_MODEL
from rich.console import Console

from cluster.cli import main, options
from cluster.plan import count_rows, make_plan, model_config, parameters
from cluster.summary import show_summary
from roclip.config import load_config
from roclip.errors import CheckpointError, ConfigError, UrlListError
from roclip.storage import sha256_file

HEAVY = {"torch", "ray", "numpy", "pyarrow", "matplotlib", "deepspeed", "fsspec"}
COMMANDS = ("run", "ingest", "train", "evaluate", "oracle", "train-segmenter", "poison", "export", "doctor", "config")
DRY = ("run", "ingest", "train", "evaluate", "oracle")
"""Commands that can tell their plan."""
PRESET = """\
name: test
data: {scenes: 1000}
arms: [clip, roclip]
ingest: {samples_per_shard: 300, image_size: 256}
train: {epochs: 6, global_batch_size: 64}
pool: {size: 128, neighbours: 0, match_every: 2, warmup: 2, filter_frac: [0.1, 0.1]}
attacks:
  targeted: {images: 4, captions_per_image: 8}
  backdoors: [{kind: patch, count: 20}]
"""


@dataclass(frozen=True)
class Answer:
    """What a process of the command gave."""

    code: int
    out: str
    err: str


def roclip(*arguments: str, cwd: Path) -> Answer:
    """Run the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    """Of a child that stands in another folder."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100", "NO_COLOR": "1"}


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "test.yaml"
    path.write_text(PRESET)
    return path


@functools.cache
def help_of(command: str) -> str:
    """What a process says to `--help`; at last which heavy modules it has loaded, and its exit code."""
    program = (
        "import sys\n"
        f"sys.argv = ['roclip', *{command.split()!r}, '--help']\n"
        "from cluster.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        f"    heavy = {HEAVY} & set(sys.modules)\n"
        "    print('loaded:', sorted(heavy), 'exit:', end.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS, "dashboard"])
def test_help_loads_no_heavy_module_when_asked(command: str):
    assert help_of(command).splitlines()[-1] == "loaded: [] exit: 0"


def test_help_lists_commands_and_exit_codes_when_asked(tmp_path: Path):
    said, _, _ = help_of("").partition("loaded:")
    for command in COMMANDS:
        assert f" {command} " in said
    for code in ("0", "1", "2", "3", "4", "5", "6", "7", "10", "20", "130"):
        assert f"\n {code} " in said
    assert roclip(cwd=tmp_path).out == said


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_when_asked(command: str):
    said, _, _ = help_of(command).partition("loaded:")
    examples = [line.strip() for line in said.split("Examples")[1].splitlines() if line.strip()]
    assert len(examples) >= 3
    assert all(example.startswith(f"roclip {command}") for example in examples)
    assert ("--dry-run" in said) == (command in (*DRY, "export"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "nothing.yaml"], "nothing.yaml: no such config."),
        (["run", "."], "expected a preset or a run directory"),
        (["run", "test.yaml", "pool.siz=3"], "unknown key 'pool.siz'. Did you mean 'pool.size'?"),
        (["run", "test.yaml", "pool.size=many"], "pool.size"),
        (["run", "test.yaml", "oops"], "expected key=value"),
        (["run"], "Missing argument"),
        (["trian"], "Did you mean 'train'?"),
        (["run", "test.yaml", "--dyr-run"], "No such option: --dyr-run"),
        (["export", "test.yaml"], "expected --out DIR"),
        (
            ["export", "test.yaml", "--out", "x", "--arm", "siglip"],
            "expected one of clip, roclip, got 'siglip'",
        ),
        (["run", "test.yaml", "model.name=RN49", "--dry-run"], "model.name: expected one of open_clip's"),
    ],
)
def test_wrong_command_line_is_one_line_and_2_when_run(
    arguments: list[str], says: str, preset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(preset.parent)
    assert main.guarded(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1
    assert out == ""


def test_dry_run_says_what_is_missing_when_the_list_is_not_there_yet(preset: Path):
    answer = roclip("run", "test.yaml", "data.scenes=0", "data.urls=nowhere/*.csv", "--dry-run", cwd=preset.parent)
    assert (answer.code, answer.err) == (0, "")
    assert "unknown (nowhere/*.csv: " in " ".join(answer.out.split())
    assert "train clip and roclip: as many steps as the list gives, on 1 rank" in answer.out


@pytest.mark.parametrize("command", DRY)
def test_dry_run_prints_config_and_plan_and_does_nothing_when_asked(command: str, preset: Path):
    answer = roclip(command, "test.yaml", "pool.size=256", "--dry-run", cwd=preset.parent)
    assert (answer.code, answer.err) == (0, "")
    assert "\n  size: 256\n" in answer.out
    assert "at most 16 an epoch, 96 an arm" in answer.out
    assert "Steps (nothing was done)\n  1. " in answer.out
    assert sorted(path.name for path in preset.parent.iterdir()) == ["test.yaml"]


def test_dry_run_takes_its_config_from_the_run_when_given_a_run_directory(preset: Path):
    run = preset.parent / "runs" / "2026-01-31-test"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(PRESET)
    answer = roclip("run", str(run), "train.epochs=3", "--dry-run", cwd=preset.parent)
    assert answer.code == 0
    assert "16 an epoch, 48 an arm" in answer.out
    assert f"run_dir: {run}" in answer.out


def test_unexpected_error_is_a_traceback_and_1_when_raised(monkeypatch: pytest.MonkeyPatch, capsys, preset: Path):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr(options, "load_config", broken)
    assert main.guarded(["run", str(preset)]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "by accident" in err


def test_ctrl_c_is_130_when_it_comes_while_working(preset: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/urls.parquet"
        with subprocess.Popen(
            [
                sys.executable,
                "-m",
                "cluster.cli",
                "run",
                "test.yaml",
                "data.scenes=0",
                f"data.urls={url}",
                "--dry-run",
            ],
            cwd=preset.parent,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        ) as child:
            connection, _ = server.accept()  # the child waits for an answer now
            with connection:
                child.send_signal(signal.SIGINT)
                _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err == "error: stopped by Ctrl-C; the same command goes on from here\n"


@pytest.mark.parametrize(
    ("fail_on", "verdict", "code"),
    [
        ("never", "poisoned", 0),
        ("suspicious", "clean", 0),
        ("suspicious", "suspicious", 10),
        ("suspicious", "inconclusive", 30),
        ("poisoned", "inconclusive", 0),
        ("suspicious", "poisoned", 20),
        ("poisoned", "suspicious", 0),
        ("poisoned", "poisoned", 20),
    ],
)
def test_verdict_decides_the_exit_code_when_fail_on_is_set(fail_on: str, verdict: str, code: int, preset: Path):
    config = load_config(preset, [f"oracle.fail_on={fail_on}"])
    summary = {"arms": {"roclip": {"oracle": {"verdict": verdict}}, "clip": {"oracle": {"verdict": "poisoned"}}}}
    assert main.verdict_code(config, summary) == code  # of the last arm of the config, whatever the summary's order
    assert main.verdict_code(config, {"arms": {"step-00000007": {"oracle": {"verdict": verdict}}}}) == code
    assert main.verdict_code(config, {"ingest": {}}) == 0
    repaired = {"oracle": {"verdict": verdict, "repair": {"accepted": True}}}
    assert main.verdict_code(config, {"arms": {"roclip": repaired}}) == (21 if code else 0)
    refused = {"oracle": {"verdict": verdict, "repair": {"accepted": False}}}
    assert main.verdict_code(config, {"arms": {"roclip": refused}}) == code


def test_export_refuses_what_no_oracle_called_clean_when_not_asked_to(preset: Path):
    checkpoints = preset.parent / "run" / "roclip" / "checkpoints"
    step = checkpoints / "step-00000007"
    config = load_config(preset, [f"run_dir={preset.parent / 'run'}"])
    with pytest.raises(CheckpointError, match="Train first"):
        main.pointed_checkpoint(config, "", "LATEST")
    step.mkdir(parents=True)
    (checkpoints / "LATEST").write_text("step-00000007")
    assert main.pointed_checkpoint(config, "", "LATEST") == step
    with pytest.raises(CheckpointError, match=r"expected TRUSTED, got none. .*--untrusted"):
        main.pointed_checkpoint(config, "", "TRUSTED")
    with pytest.raises(CheckpointError, match="expected a trusted checkpoint"):
        main.require_trust(step)
    (checkpoints / "TRUSTED").write_text("step-00000006\n")
    with pytest.raises(CheckpointError, match="expected a trusted checkpoint"):
        main.require_trust(step)
    (checkpoints / "TRUSTED").write_text("step-00000007\n")
    main.require_trust(step)
    assert main.pointed_checkpoint(config, "roclip", "TRUSTED") == step


def test_export_is_4_and_writes_nothing_when_not_trusted(preset: Path):
    checkpoints = preset.parent / "run" / "roclip" / "checkpoints"
    (checkpoints / "step-00000007").mkdir(parents=True)
    (checkpoints / "LATEST").write_text("step-00000007")
    arguments = ["export", "test.yaml", f"run_dir={preset.parent / 'run'}", "--out", "model"]
    answer = roclip(*arguments, cwd=preset.parent)
    assert (answer.code, answer.err.count("\n")) == (4, 1)
    assert roclip(*arguments, "--untrusted", "--dry-run", cwd=preset.parent).code == 0
    assert not (preset.parent / "model").exists()


def test_export_writes_what_open_clip_loads_when_trusted(preset: Path, capsys: pytest.CaptureFixture[str]):
    import open_clip
    import torch

    from roclip.model.towers import Towers

    (preset.parent / "tiny.json").write_text(TINY_MODEL)
    towers = Towers("tiny", preset.parent / "tiny.json").eval()
    step, out = preset.parent / "checkpoints" / "step-00000007", preset.parent / "model"
    towers.save(step)
    sums = "".join(f"{sha256_file(path)}  {path.name}\n" for path in sorted(step.iterdir()))
    (step / "SHA256SUMS").write_text(sums)
    assert main.guarded(["export", str(step), "--out", str(out)]) == 4
    (step.parent / "TRUSTED").write_text(step.name)
    assert main.guarded(["export", str(step), "--out", str(out)]) == 0
    assert f"local-dir:{out}" in capsys.readouterr().out
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    tokens = towers.tokenize(["a red boat"])
    with torch.inference_mode():
        theirs = model.eval().encode_text(tokens, normalize=True)
        assert torch.allclose(theirs, towers.encode_text(tokens), atol=1e-6)


def test_second_command_is_5_when_another_works_in_the_run_directory(preset: Path):
    run = preset.parent / "run"
    run.mkdir()
    with (run / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        answer = roclip("ingest", "test.yaml", f"run_dir={run}", cwd=preset.parent)
    assert (answer.code, answer.err.count("\n")) == (5, 1)
    assert "process 4711 works in this run directory" in answer.err
    assert [path.name for path in run.iterdir()] == ["run.lock"]


# ---- the plan -------------------------------------------------------------------------------------------------


def test_plan_counts_rows_steps_and_phases_when_scenes_are_rendered(preset: Path):
    plan = make_plan(load_config(preset))
    assert plan.rows == 1000 + 4 * 8 + 20
    assert plan.shards == 4
    assert plan.steps_per_epoch == 1052 // 64
    assert plan.steps == 6 * 16
    assert plan.matched == (4, 6)
    assert plan.gated == (1, 2, 3, 5)
    assert plan.pool_bytes == 128 * (1024 * 4 + 8)
    assert plan.shard_bytes == 1052 * 30_000
    assert plan.download_bytes == 0


def test_plan_knows_the_phases_when_witnesses_lead_the_warm_up(preset: Path):
    plan = make_plan(load_config(preset, ["pool.neighbours=8", "pool.match_every=5"]))
    assert plan.matched == (1, 2, 5)
    assert plan.gated == (3, 4, 6)


@pytest.mark.parametrize(
    ("overrides", "gated"),
    [
        (["pool.filter_frac=[0,0]"], ()),
        (["pool.size=3000"], (3, 5)),  # 1024 captions an epoch
        (["pool.update=matched_only"], (5,)),
        (["pool.update=matched_only", "pool.match_every=0"], ()),
        (["pool.size=1000000"], ()),
    ],
)
def test_gate_opens_in_the_plan_when_the_pool_is_full(overrides: list[str], gated: tuple[int, ...], preset: Path):
    assert make_plan(load_config(preset, overrides)).gated == gated


@pytest.mark.parametrize("name", ["RN50", "ViT-S-32"])
def test_parameters_match_open_clip_when_the_towers_are_its_own(name: str, preset: Path):
    from roclip.model.towers import Towers

    towers = Towers(name)
    count = sum(parameter.numel() for parameter in towers.clip.parameters())
    assert parameters(model_config(load_config(preset, [f"model.name={name}"]))) == count


def test_model_is_the_presets_own_when_it_lies_beside_it(preset: Path):
    (preset.parent / "models").mkdir()
    (preset.parent / "models" / "tiny.json").write_text(json.dumps({"embed_dim": 3}))
    assert model_config(load_config(preset, ["model.name=tiny"])) == {"embed_dim": 3}


def test_rows_are_counted_when_the_list_has_any_format(preset: Path):
    folder = preset.parent / "urls"
    folder.mkdir()
    table = pa.table({"url": [f"http://host/{i}.jpg" for i in range(100)], "caption": ["a"] * 100})
    pq.write_table(table, folder / "a.parquet")
    (folder / "b.csv").write_text("url,caption\n" + "http://host/x,y\n" * 10)
    (folder / "c.txt").write_text("http://host/x\n" * 7)
    files = {"a.parquet": 100, "b.csv": 10, "c.txt": 7, "": 117, "*.csv": 10}
    for name, rows in files.items():
        config = load_config(preset, ["data.scenes=0", f"data.urls={folder / name}"])
        assert count_rows(config) == (rows, True)
    assert count_rows(load_config(preset, ["data.scenes=0", f"data.urls={folder}", "data.limit=50"]))[0] == 50


def test_rows_are_estimated_when_the_list_is_long(preset: Path):
    path = preset.parent / "urls.csv"
    path.write_text("url,caption\n" + "http://host/1234567.jpg,a picture of a boat\n" * 60_000)
    rows, exact = count_rows(load_config(preset, ["data.scenes=0", f"data.urls={path}"]))
    assert not exact
    assert rows == pytest.approx(60_000, rel=0.01)


def test_rows_name_the_file_when_a_parquet_is_broken(preset: Path):
    (preset.parent / "urls.parquet").write_text("PAR1 not")
    with pytest.raises(UrlListError, match=r"urls\.parquet: this parquet file cannot be read"):
        count_rows(load_config(preset, ["data.scenes=0", f"data.urls={preset.parent / 'urls.parquet'}"]))


# ---- the summary ----------------------------------------------------------------------------------------------


def test_summary_shows_figures_and_files_when_printed(tmp_path: Path):
    backdoor = {"successes": 6, "n": 300, "rate": 0.02, "ci95": [0.0092, 0.0429]}
    arms = {
        "clip": {"zero_shot_top1": 0.5, "attacks": {}, "oracle": {"verdict": "poisoned"}},
        "roclip": {"zero_shot_top1": 0.4, "attacks": {"backdoor": backdoor}, "oracle": {"verdict": "clean"}},
    }
    ingest = {"urls": 1200, "succeeded": 1000, "failed": {"timeout": 200}, "shards": 4}
    (tmp_path / "report.html").write_text("")
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - the console keeps it
    show_summary(console, {"ingest": ingest, "arms": arms}, tmp_path)
    console.file.close()
    text = console.export_text()
    assert "1,000 of 1,200 URLs are in 4 shards (lost: 200 timeout)" in text
    assert "50.0 %" in text
    assert "6/300  2.0 % [0.9, 4.3]" in text
    assert "poisoned" in text
    assert "linear probe" not in text
    assert str(tmp_path / "report.html") in text
    assert "summary.json" not in text


def test_resolve_refuses_a_folder_when_it_is_no_run(tmp_path: Path):
    with pytest.raises(ConfigError, match="expected a preset or a run directory"):
        main.resolve(tmp_path, [])
