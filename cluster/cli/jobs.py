"""The commands `roclip submit`, `status`, `logs`, `stop` and `runs`: runs on a cluster, from outside."""

import datetime
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.cli.options import ConfigPath, Overrides, examples, resolve
from roclip.errors import ConfigError

SUBMIT_EXAMPLES = examples(
    "submit configs/laion.yaml data.shards=s3://mine/laion runs=/fsx/runs --address http://head:8265",
    "submit configs/laion.yaml runs=/fsx/runs --run-id laion-b16 --detach",
    "submit configs/demo.yaml runs=/shared/runs",
)
STATUS_EXAMPLES = examples("status", "status laion-b16", "status laion-b16.2 --address http://head:8265")
LOGS_EXAMPLES = examples("logs laion-b16", "logs laion-b16.2 --follow")
STOP_EXAMPLES = examples("stop laion-b16")
RUNS_EXAMPLES = examples("runs --address http://head:8265")
INTERRUPTED = 130
_STYLES = {"RUNNING": "bold green", "PENDING": "yellow", "FAILED": "bold red", "STOPPED": "yellow"}

Address = Annotated[
    str,
    typer.Option(
        metavar="URL",
        help="The cluster's dashboard, such as http://head:8265; else RAY_API_SERVER_ADDRESS or RAY_ADDRESS.",
    ),
]
JobName = Annotated[
    str, typer.Argument(metavar="RUN|JOB", help="A run's id or directory (its newest job), or a job's id.")
]


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = "",
    run_id: Annotated[str, typer.Option(metavar="NAME", help="The run directory's name, in `runs`.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is sent; do not follow its log.")] = False,
) -> int:
    """Send a run to a cluster as a Ray Job and follow it; ends with the run's own exit code.

    Ctrl-C detaches and leaves the job running. A run whose job is still alive is followed, not sent again; one that was
    stopped or lost resumes in its run directory, which all nodes must see. The token is Ray's: RAY_AUTH_TOKEN,
    RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
    """
    settings = resolve(config, overrides)
    if (run_id and not run_id.strip(".")) or "/" in run_id:
        raise ConfigError(f"--run-id: expected a folder's name, got {run_id!r}.")
    from cluster.jobs.jobs import Jobs

    jobs = Jobs(address)
    job, new = jobs.submit(settings, run_id=run_id)
    _say(f"job      {job.id} {'sent to' if new else 'is there already, on'} {jobs.address}")
    if not new:
        _say("         followed, not sent again: its config is the one that it began with")
    if detach:
        _say(_how_to(jobs, job))
        return 0
    return _follow(jobs, job)


def status(name: Annotated[str, typer.Argument(metavar="[RUN|JOB]")] = "", address: Address = "") -> int:
    """Show how a run on a cluster is doing: its newest job, or the newest of all, and its stages if its run directory can
    be read from here."""
    from cluster.jobs.jobs import Jobs
    from cluster.jobs.log import last_progress
    from roclip.report.oracle_state import PngStore
    from roclip.report.run_state import RunReader, is_run

    jobs = Jobs(address)
    job = jobs.find(name)
    table = Table.grid(padding=(0, 2))
    rows = {"job": job.id, "state": _state(job), "since": _since(job), **job.metadata}
    for key in ("job_name", "identity", "job_submission_id"):
        rows.pop(key, None)
    rows["progress"] = last_progress(jobs.log(job))
    if not job.is_alive and job.message:
        rows["said"] = " ".join(job.message.split())[:400]
    run = Path(job.metadata["run_dir"])
    if is_run(run):
        for stage in RunReader(run, PngStore()).read_all().stages:
            share = "" if stage.share is None else f"{stage.share:.0%}  "
            rows[stage.title] = f"{share}{stage.text or stage.status}"
    for key, value in rows.items():
        table.add_row(Text(key), value if isinstance(value, Text) else Text(str(value)))
    Console().print(table, soft_wrap=True)
    return 0


def logs(
    name: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the log until the job ends.")] = False,
    address: Address = "",
) -> int:
    """Print the log of a run on a cluster. With --follow, ends with the run's own exit code."""
    from cluster.jobs.jobs import Jobs
    from cluster.jobs.log import Log

    jobs = Jobs(address)
    job = jobs.find(name)
    if follow:
        return _follow(jobs, job)
    Log(print).end(jobs.log(job))
    return 0


def stop(name: JobName, address: Address = "") -> int:
    """Stop a run on a cluster cleanly, as Ctrl-C would; `roclip submit` of the same config resumes it."""
    from cluster.jobs.jobs import Jobs

    jobs = Jobs(address)
    job = jobs.find(name)
    if not job.is_alive:
        _say(f"{job.id} has ended before: {_state(job)}")
        return 0
    _say(f"stopping {job.id} …")
    _say(f"{job.id}: {_state(jobs.stop(job))}")
    return 0


def runs(address: Address = "") -> int:
    """List the runs that `roclip submit` sent to a cluster: live ones first, then the newest."""
    from cluster.jobs.jobs import Jobs
    from cluster.jobs.log import last_progress

    jobs = Jobs(address)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("job", "config", "state", "since"):
        table.add_column(column, no_wrap=True)
    table.add_column("progress", overflow="ellipsis", no_wrap=True)
    for job in jobs.all():
        progress = last_progress(jobs.log(job)) if job.is_alive else ""
        table.add_row(job.id, job.metadata.get("config", ""), _state(job), _since(job), Text(progress))
    Console(width=None if sys.stdout.isatty() else 160).print(
        table if table.row_count else f"no runs on {jobs.address}"
    )
    return 0


def _follow(jobs: Any, job: Any) -> int:
    from cluster.display import Display
    from cluster.jobs.log import show_line

    try:
        with Display() as display:
            job = jobs.follow(job, show_line(display), display.say)
    except KeyboardInterrupt:
        _say(f"detached; the job goes on\n{_how_to(jobs, job)}")
        sys.exit(INTERRUPTED)  # nothing was stopped, so `main` is not to say so
    _say(f"job      {job.id}: {_state(job)}")
    if job.exit_code is None and job.code:
        _say(" ".join(job.message.split()))
    return job.code


def _state(job: Any) -> Text:
    code = "" if job.is_alive or job.exit_code in (None, 0) else f", exit code {job.exit_code}"
    return Text(job.status.value.lower() + code, _STYLES.get(job.status.value, ""))


def _since(job: Any) -> str:
    moment = job.started if job.is_alive else job.ended
    if moment is None:
        return ""
    passed = datetime.timedelta(seconds=int((datetime.datetime.now() - moment).total_seconds()))
    return f"{moment:%Y-%m-%d %H:%M:%S} ({passed})"


def _how_to(jobs: Any, job: Any) -> str:
    return (
        f"log:     roclip logs {job.id} --follow --address {jobs.address}\n"
        f"stop:    roclip stop {job.id} --address {jobs.address}"
    )


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
