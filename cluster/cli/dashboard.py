"""The command `roclip dashboard`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli.options import examples
from roclip.errors import ConfigError

DASHBOARD_EXAMPLES = examples(
    "dashboard runs/2026-01-31-demo",
    "dashboard runs/2026-01-31-demo --port 8321",
    "dashboard /shared/runs/laion --host 0.0.0.0",
)


def dashboard(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 0,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Address to listen on. Any but loopback needs the token that is printed."),
    ] = "127.0.0.1",
) -> int:
    """Show a run in a browser: progress, curves, pool, ingest, ranks, verdict. Live, and read-only.

    It reads the files of the run directory and needs no Ray, so it works during the run, after it and after a crash. On
    another machine: ssh -L 8321:127.0.0.1:8321 HOST, and --port 8321 there. Ctrl-C ends it.
    """
    from roclip.report.run_state import is_run

    if not run.is_dir() or not is_run(run):
        raise ConfigError(
            f"{run}: expected a run directory, got none. Name one that `roclip run` or `roclip train` made."
        )
    import asyncio

    from cluster.dashboard.guard import Guard
    from cluster.dashboard.server import serve

    def ready(address: str, guard: Guard) -> None:
        if guard.token:
            Console(stderr=True).print(
                f"warning: the page can be reached from other machines at {host}, and HTTP is not encrypted. The token in the "
                "address lets in whoever has it. An SSH tunnel to loopback is safer.",
                style="yellow",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
            address += f"#token={guard.token}"
        typer.echo(f"dashboard {address}")

    asyncio.run(serve(run, host, port, ready))
    return 0
