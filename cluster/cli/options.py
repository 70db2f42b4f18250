"""What the commands share: arguments, examples, and how a config is found."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from roclip.config import Config, load_config
from roclip.errors import ConfigError

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A preset (YAML), or a run directory: its config.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, such as pool.size=4096 train.lr=1e-3."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Only print the resolved config, the plan, the steps and the bytes."),
]


def examples(*lines: str) -> str:
    """Examples of command lines, for the end of a command's help."""
    return "[bold]Examples[/]\n\n" + "\n\n".join(f"  roclip {line}" for line in lines)


def resolve(path: Path, overrides: list[str] | None) -> Config:
    """Load the config of a preset or a run directory, with overrides. Raises `ConfigError`."""
    if not path.is_dir():
        return load_config(path, overrides or ())
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: expected a preset or a run directory with a config.yaml, got neither.")
    return dataclasses.replace(load_config(path / "config.yaml", overrides or ()), run_dir=str(path))


def show_dry_run(config: Config, command: str) -> int:
    """Print what a command would do, and return the exit code."""
    from cluster.plan import make_plan, show_plan, stages_of

    plan = make_plan(config)
    show_plan(Console(), config, plan, stages_of(config, plan, command))
    return 0
