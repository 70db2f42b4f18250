"""The command `roclip train-segmenter`.

A command of its own: `roclip oracle` takes a config as its first word, where a sub-command would have to stand.
"""

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import examples
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
        float, typer.Option(help="Share of the images that calibrate it instead of training it.")
    ] = OracleConfig.reference_frac,
    limit: Annotated[int, typer.Option(help="Largest number of images to use, drawn by the seed; 0 is all.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the order and the draw.")] = 0,
    licence: Annotated[str, typer.Option(metavar="TEXT", help="Licence of the images and masks, for the report.")] = "",
) -> int:
    """Train an oracle from masks: a small segmentation network that knows which labels it can see.

    It learns from masks only, never from captions or crawled images. Name its folder in oracle.weights. Running the same
    command again does nothing once it is done.
    """
    if out is None:
        raise ConfigError("train-segmenter: expected --out DIR, got none. Name the folder to write.")
    settings = OracleConfig(epochs=epochs, reference_frac=holdout)
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
        typer.echo(f"unchecked, as it cannot tell them apart: {', '.join(unseen)}")
    return 0
