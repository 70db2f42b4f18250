"""What a crawl has wrong without any attacker: captions of other images, and images that occur many times.

The data of demos and experiments are clean, and a defence that holds on clean data may not hold on the web, where about a third
of the captions have nothing to do with their images.
"""

import numpy as np
import pyarrow as pa

from roclip.config.data import DirtConfig
from roclip.errors import ConfigError

COPIES = 12
"""How often an image occurs that has copies."""


def soil(clean: pa.Table, dirt: DirtConfig, seed: int) -> pa.Table:
    """Return as many pairs, some of which are copies of an image and some of which have the caption of another pair.

    A copy takes a caption that another image of the same class had, so copies agree without being equal. Captions are
    exchanged among pairs that are no copies; each of these pairs gets the caption of another one.

    Args:
        clean: Columns image, caption and label, in any order of rows.
        seed: Seed of the choice.

    Raises:
        ConfigError: more pairs are to be copies or mismatched than there are.
    """
    if dirt == DirtConfig():
        return clean
    rows, rng = len(clean), np.random.default_rng((seed, 5))
    groups = round(dirt.copied_frac * rows / COPIES)
    copies, mismatched = groups * COPIES, round(dirt.mismatched_frac * rows)
    if copies + mismatched > rows:
        raise ConfigError(
            f"data.dirt: expected at most {rows} pairs that are copies or mismatched, got {copies} and {mismatched}. "
            "Lower copied_frac or mismatched_frac."
        )
    order, images, captions = rng.permutation(rows), np.arange(rows), np.arange(rows)
    labels = clean["label"].combine_chunks().dictionary_encode().indices.to_numpy()
    rows_of = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    for members in order[:copies].reshape(groups, COPIES):
        images[members] = members[0]
        captions[members[1:]] = rng.choice(rows_of[labels[members[0]]], len(members) - 1)
    chosen = order[copies : copies + mismatched]
    captions[chosen] = np.roll(chosen, 1)
    return pa.table(
        {
            "image": clean["image"].take(pa.array(images)),
            "caption": clean["caption"].take(pa.array(captions)),
            "label": clean["label"].take(pa.array(images)),
        }
    )
