"""The command `roclip config`: every key, what it means and what a preset sets."""

import dataclasses
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from cluster.cli.options import examples
from roclip.errors import ConfigError

CONFIG_EXAMPLES = examples(
    "config pool",
    "config train.lr",
    "config --search lr",
    "config --preset demo",
    "config deploy",
)
_COLUMNS = 100


def config(
    where: Annotated[
        str, typer.Argument(metavar="[SECTION|KEY]", help="Only this section, such as pool, or key.")
    ] = "",
    search: Annotated[
        str, typer.Option(metavar="TEXT", help="Only keys with this text in their name or description.")
    ] = "",
    preset: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Only keys that this preset sets, with its values.")
    ] = "",
) -> int:
    """Print every key of a config with its type, default, unit and description.

    Keys are set in a preset (YAML) or as overrides of a command, such as pool.size=4096. Those of `deploy` describe a
    cluster for `roclip render`.
    """
    from roclip.config.reference import sections

    values = preset_values(preset) if preset else None
    shown = []
    for section in sections():
        keys = [key for key in section.keys if _below(key.name, where) or section.name == where]
        keys = [key for key in keys if search.lower() in f"{key.name} {key.text}".lower()]
        keys = [key for key in keys if values is None or key.name in values]
        if keys:
            shown.append(dataclasses.replace(section, keys=tuple(keys)))
    if not shown:
        names = ", ".join(section.name for section in sections() if section.name and "." not in section.name)
        raise ConfigError(f"config: expected a section or a key, got none that fits. Sections: {names}.")
    console = Console(highlight=False)
    for section in shown:
        for line in _section(section, values or {}, whole=section.name == where):
            console.print(line, soft_wrap=True)
    return 0


def preset_values(preset: str) -> dict[str, Any]:
    """What a preset sets, by dotted key. Raises `ConfigError` for a file or a key that does not exist."""
    import yaml

    from roclip.config.reference import flattened, sections
    from roclip.config.renamed import old_keys

    path = Path(preset) if Path(preset).suffix else Path("configs") / f"{preset}.yaml"
    if not path.is_file():
        near = ", ".join(sorted(file.stem for file in Path("configs").glob("*.yaml")))
        raise ConfigError(f"--preset: expected a file or one of {near or 'configs/*.yaml'}, got {preset!r}.")
    content = yaml.safe_load(path.read_text()) or {}
    if told := old_keys(content):
        raise ConfigError(f"{path}: {' '.join(told.values())}")
    values, known = dict(flattened(content)), {key.name for section in sections() for key in section.keys}
    if unknown := [key for key in values if key not in known]:
        raise ConfigError(f"{path}: expected keys of a run, got {unknown[0]!r}. `roclip config --search` finds a key.")
    return values


def _below(name: str, where: str) -> bool:
    return not where or name == where or name.startswith(f"{where}.")


def _section(section: Any, values: dict[str, Any], *, whole: bool) -> Iterator[Text]:
    if section.name:
        yield Text(f"\n{section.name}", "bold")
    if whole or not values:
        yield from (Text(line, "dim") for line in textwrap.wrap(section.text, _COLUMNS))
    for key in section.keys:
        default = "required" if key.default is dataclasses.MISSING else _written(key.default)
        line = Text.assemble("  ", (key.name, "bold cyan"), "  ", (key.kind, "green"), "  ")
        if key.name in values:
            line.append(f"= {_written(values[key.name])}  ", "bold")
            line.append(f"(default {default})")
        else:
            line.append(f"= {default}")
        if key.unit:
            line.append(f"  [{key.unit}]", "yellow")
        yield line
        yield from (Text(f"      {part}") for part in textwrap.wrap(key.text, _COLUMNS - 6))


def _written(value: Any) -> str:
    """A value as YAML has it, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_written(inner)}' for name, inner in value.items())}}}"
    return "null" if value is None else "''" if value == "" else str(value)
