"""The command `roclip doctor`: this machine, or with --cluster every node of a Ray cluster."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli.options import Overrides, examples, resolve
from roclip.config import Config
from roclip.errors import ConfigError

DOCTOR_EXAMPLES = examples(
    "doctor",
    "doctor configs/demo.yaml",
    "doctor configs/web.yaml cluster.workers=8 cluster.gpus_per_worker=1",
    "doctor configs/laion.yaml cluster.address=auto --cluster",
    "doctor configs/laion.yaml --cluster --address 10.0.0.1:6379 --verbose",
)


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also check for what this config needs.")
    ] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Check every node of the Ray cluster and what lies between them.")
    ] = False,
    address: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Address of that cluster; without it, cluster.address or RAY_ADDRESS."),
    ] = "",
    timeout_s: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            min=1.0,
            help="Time in which each node must answer.",
        ),
    ] = 60.0,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="One line for each check and node, instead of one for each check.")
    ] = False,
) -> int:
    """Check that this machine has what a run needs: cores, memory, disk, compiler, GPUs, FAISS, ports.

    With --cluster, check every node: versions, disks, stores, clocks, names, all-reduce, GPUs, limits, dashboard, token.
    Ends with 7 if a check failed, and leaves nothing behind.
    """
    settings = resolve(config, overrides) if config else None
    if cluster or address:
        return _cluster(settings, address, timeout_s, verbose)
    from cluster.doctor.checks import doctor as run_checks
    from cluster.doctor.checks import exit_code, show_checks

    checks = run_checks(settings)
    show_checks(Console(), checks)
    return exit_code(checks)


def _cluster(config: Config | None, address: str, timeout_s: float, verbose: bool) -> int:
    configured = config.cluster.address if config and config.cluster.address != "local" else ""
    address = address or configured or os.environ.get("RAY_ADDRESS", "")
    if not address or address.startswith("http"):
        raise ConfigError(
            f"doctor --cluster: expected the address of a running Ray, got {address or 'none'}. Name it with "
            "--address HOST:6379 (on the head: --address auto), cluster.address=… or RAY_ADDRESS."
        )
    from cluster.display import Display
    from cluster.doctor.actors import connected
    from cluster.doctor.checks import exit_code, show_checks
    from cluster.doctor.cluster import by_check, by_node, examine

    with Display() as display, connected(address) as dashboard_url:

        def say(done: float, total: float, text: str) -> None:
            display.show("doctor", done, total, text)

        findings = examine(config, dashboard_url, say, timeout_s)
    checks = by_check(findings)
    show_checks(Console(), by_node(findings) if verbose else checks)
    return exit_code(checks)
