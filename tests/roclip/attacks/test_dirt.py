"""A dirty world has as many pairs as a clean one, and what is wrong with it is what was asked for."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import preset

from roclip.attacks.corpus import prepare
from roclip.attacks.dirt import soil
from roclip.config import DataConfig, DirtConfig, load_config
from roclip.errors import ConfigError

ROWS, CLASSES = 1200, 6
CLEAN = pa.table(
    {
        "image": [b"image %d" % n for n in range(ROWS)],
        "caption": [f"class {n % CLASSES}, photo {n}" for n in range(ROWS)],
        "label": [f"class {n % CLASSES}" for n in range(ROWS)],
    }
)


def number(image: bytes) -> int:
    return int(image.split()[1])


def test_clean_world_is_left_as_it_is():
    assert soil(CLEAN, DirtConfig(), 0).equals(CLEAN)


@pytest.mark.parametrize("frac", [0.15, 0.3, 1.0])
def test_mismatched_pairs_exchange_their_captions(frac):
    dirty = soil(CLEAN, DirtConfig(mismatched_frac=frac), 3)
    assert dirty["image"].equals(CLEAN["image"])
    assert Counter(dirty["caption"].to_pylist()) == Counter(CLEAN["caption"].to_pylist())
    changed = np.array(dirty["caption"].to_pylist()) != np.array(CLEAN["caption"].to_pylist())
    assert changed.sum() == round(frac * ROWS)


def test_copies_agree_on_the_class_and_not_on_the_words():
    dirty = soil(CLEAN, DirtConfig(copied_frac=0.15), 3)
    assert len(dirty) == ROWS
    copied = {image: count for image, count in Counter(dirty["image"].to_pylist()).items() if count > 1}
    assert list(copied.values()) == [12] * 15
    for row in dirty.to_pylist():
        assert row["label"] == f"class {number(row['image']) % CLASSES}"
        assert row["caption"].startswith(row["label"])
    image = next(iter(copied))
    captions = {row["caption"] for row in dirty.to_pylist() if row["image"] == image}
    assert len(captions) > 6


def test_mismatched_pairs_are_no_copies_and_the_seed_chooses_both():
    dirt = DirtConfig(mismatched_frac=0.3, copied_frac=0.15)
    dirty = soil(CLEAN, dirt, 3)
    counts = Counter(dirty["image"].to_pylist())
    wrong = [row for row in dirty.to_pylist() if not row["caption"].endswith(f"photo {number(row['image'])}")]
    assert sum(counts[row["image"]] == 1 for row in wrong) == 360
    assert dirty.equals(soil(CLEAN, dirt, 3))
    assert not dirty.equals(soil(CLEAN, dirt, 4))


def test_more_dirt_than_pairs_is_refused():
    with pytest.raises(ConfigError, match=r"data.dirt: expected at most 1200 pairs"):
        soil(CLEAN, DirtConfig(mismatched_frac=0.9, copied_frac=0.2), 0)
    with pytest.raises(ConfigError, match=r"data.dirt.copied_frac"):
        DirtConfig(copied_frac=1.2)


def test_origin_serves_a_dirty_world_whose_poisons_are_those_of_the_clean_one(tmp_path):
    text = (
        "name: x\ndata: {scenes: 60, faults: false}\nevaluate: {size: 12}\noracle: {trusted: 12}\nmodel: {name: tiny}\n"
    )
    text += "ingest: {image_size: 32}\nattacks: {backdoors: [{kind: patch, count: 5}]}\n"
    config = load_config(preset(tmp_path, text))
    dirty = replace(config, data=replace(config.data, dirt=DirtConfig(mismatched_frac=0.5)))
    tables = []
    for name, one in (("clean", config), ("dirty", dirty)):
        prepare(one, tmp_path / name)
        tables.append(pq.read_table(tmp_path / name / "corpus.parquet").to_pylist())
        assert pq.read_table(tmp_path / name / "poison.parquet").num_rows == 5
    assert [row["image"] for row in tables[0]] == [row["image"] for row in tables[1]]
    assert sum(a["caption"] != b["caption"] for a, b in zip(*tables, strict=True)) in range(20, 31)  # captions repeat
    truths = [pq.read_table(tmp_path / name / "poison.parquet") for name in ("clean", "dirty")]
    assert truths[0].equals(truths[1])


def test_dirt_without_the_embedded_origin_is_refused():
    dirt = DirtConfig(mismatched_frac=0.3)
    assert DataConfig(scenes=100, dirt=dirt).dirt == dirt
    with pytest.raises(ConfigError, match=r"data.dirt: expected data.images or data.scenes"):
        DataConfig(urls="urls.parquet", dirt=dirt)
