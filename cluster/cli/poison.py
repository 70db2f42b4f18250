"""The command `roclip poison`."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import ConfigPath, Overrides, examples, resolve
from roclip.errors import ConfigError

POISON_EXAMPLES = examples(
    "poison configs/demo.yaml --shards runs/2026-01-31-demo/shards --out poisoned",
    "poison configs/demo.yaml attacks.backdoors.0.kind=wanet --shards clean --out poisoned",
    "poison configs/demo.yaml attacks.backdoors.0.pattern=logo.png --shards clean --out poisoned",
    "poison configs/demo.yaml --urls urls.parquet --out list --base-url http://localhost/",
)


def poison(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="New folder to write; required.")] = None,
    shards: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Clean shards; data.shards unless given.")
    ] = None,
    urls: Annotated[str | None, typer.Option(metavar="LIST", help="Clean URL list; data.urls unless given.")] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names: a JSON list, or a text with one a line.")
    ] = None,
    base_url: Annotated[
        str, typer.Option(metavar="URL", help="With --urls: what the new rows' URLs begin with, before images/…")
    ] = "",
) -> int:
    """Copy clean shards or a clean URL list, add the attacks of the config, and write the ground truth beside the copy.

    For evaluation only. The source is not changed, and --out must be a new or empty folder. Train on the copy with
    data.shards=FOLDER or data.urls=FOLDER/urls.parquet.
    """
    settings = resolve(config, overrides)
    shards = shards or (Path(settings.data.shards) if settings.data.shards and not urls else None)
    urls = urls or ("" if shards else settings.data.urls)
    if out is None or bool(shards) == bool(urls):
        raise ConfigError(
            "poison: expected --out FOLDER and one of --shards FOLDER and --urls LIST, got "
            f"--out {out}, --shards {shards}, --urls {urls or None}."
        )
    from cluster import poison
    from cluster.display import Display

    with Display() as display:

        def say(done: float, total: float, text: str) -> None:
            display.show("poison", done, total, text)

        if shards:
            counts = poison.poison_shards(settings, shards, out, labels, say)
        else:
            counts = poison.poison_urls(settings, str(urls), out, labels, base_url, say)
    typer.echo(f"wrote {out}: " + ", ".join(f"{name} {number}" for name, number in counts.items()))
    return 0
