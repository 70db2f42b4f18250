"""The command `roclip train-segmenter`.

A command of its own: `roclip oracle` takes a config as its first word, where a sub-command would have to stand.
"""

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import DryRun, examples
from roclip.config import OracleConfig
from roclip.errors import ConfigError

SEGMENTER_EXAMPLES = examples(
    "train-segmenter runs/2026-01-31-demo --out scenes-oracle",
    "train-segmenter data/clothing-masks --out clothing-oracle --licence Apache-2.0",
    "train-segmenter data/fashion/train.parquet --label-col articleType --out fashion-oracle",
    "train-segmenter folder-with-images-and-masks --labels labels.txt --epochs 30 --out oracle",
)


def train_segmenter(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Images with masks: a run directory, a folder with images/ masks/ and labels.json, a parquet (image, mask), "
            "or a parquet of photos on white with a column of labels.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write; required.")] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names: a JSON list, or a text with one a line.")
    ] = None,
    image_col: Annotated[str, typer.Option(metavar="NAME", help="Photos on white: the column of images.")] = "image",
    label_col: Annotated[str, typer.Option(metavar="NAME", help="Photos on white: the column of labels.")] = "label",
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = OracleConfig.epochs,
    holdout: Annotated[
        float, typer.Option(help="Share of the images that it is calibrated on instead.")
    ] = OracleConfig.reference_frac,
    limit: Annotated[int, typer.Option(help="Use at most so many images, drawn by the seed; 0 is all.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the weights, the order and the draw.")] = 0,
    licence: Annotated[str, typer.Option(metavar="TEXT", help="Of the images and masks, for the report.")] = "",
    dry_run: DryRun = False,
) -> int:
    """Train an oracle from masks: a small segmentation network that knows which labels it can see.

    Only masks teach it, never captions or crawled images. Name its folder in oracle.weights. The same command does
    nothing when it is done.
    """
    if out is None:
        raise ConfigError("train-segmenter: expected --out DIR, got none. Name the folder to write.")
    settings = OracleConfig(epochs=epochs, reference_frac=holdout)
    if dry_run:
        typer.echo(f"would train a segmenter on {source} for {epochs} epochs and write it to {out}")
        return 0
    from cluster.display import Display
    from roclip.oracle.segmenters.mask_sets import PhotoColumns, read_labels, read_masks, without_background
    from roclip.oracle.segmenters.trained import train_on

    with Display() as display:

        def say(done: float, total: float, text: str) -> None:
            display.show("oracle", done, total, text)

        found = read_masks(
            source,
            without_background(read_labels(labels)) if labels else (),
            photos=PhotoColumns(image_col, label_col),
            limit=limit,
            seed=seed,
        )
        segmenter = train_on(found, settings, seed, out, say, licence)
    unseen = [label for label in segmenter.labels if not segmenter.covers(label)]
    typer.echo(f"wrote {out}; use it with oracle.weights={out}")
    if unseen:
        typer.echo(f"unchecked, for it cannot tell them apart: {', '.join(unseen)}")
    return 0
