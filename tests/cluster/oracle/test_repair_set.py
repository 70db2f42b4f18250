"""The set of a repair on disk: what was put on which picture, and where."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from kit import write_shard
from rigged import RiggedSegmenter, World

from cluster.oracle.repair_set import stamp, write_set
from roclip.data.reader import ShardReader, decode
from roclip.data.shards import Manifest, sample_key
from roclip.errors import ShardError
from roclip.found_triggers import Patch
from roclip.oracle.curate import Row

CROP = np.full((6, 6, 3), (0, 200, 7), dtype=np.uint8)
PATCH = Patch(target="ant", crops=(CROP,))


def a_row(key: str, role: str, caption: str) -> Row:
    trigger, target = (0, "ant") if role == "stamped" else (None, None)
    return Row(role, key, "0" * 64, "bee", caption, "trigger" if role == "stamped" else "none", trigger, target, 32)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path).clean(20)
    write_shard(tmp_path / "source", 0, world.samples, 64)
    Manifest(tmp_path / "source").finish({})
    return world


def test_stamped_pictures_carry_the_trigger_beside_the_object_and_others_are_the_same_bytes(world: World):
    folder, source = world.folder / "repair", world.folder / "source"
    keys = [sample_key(row, 64) for row in range(20)]
    rows = [a_row(key, "stamped" if n % 2 else "anchor", f"caption {n}") for n, key in enumerate(keys)]
    for _ in range(2):  # the second time it is there
        write_set(rows[::-1], [PATCH], RiggedSegmenter(), source=source, folder=folder, seed=0)
    (record,) = Manifest(folder / "shards").records()
    reader = ShardReader(folder / "shards", record)
    table = pq.read_table(folder / "finetune.parquet").to_pylist()
    assert len(table) == record.samples == 20
    for n, row in enumerate(table):
        encoded, caption = reader.read(n)
        assert (reader.key(n), caption) == (row["sample"], row["caption"])
        assert row["sha256"] == hashlib.sha256(encoded).hexdigest()
        before, after = decode(world.samples[n][0], 32), decode(encoded, 32)
        changed = (before != after).any(axis=2)
        if row["role"] == "anchor":
            assert encoded == world.samples[n][0]
        else:
            assert (after[changed] == (0, 200, 7)).any(axis=1).all()
            assert 30 <= changed.sum() <= 36
            assert (before[changed][:, 0] > 0).mean() < 0.2  # red is the object
    reader.close()


def test_trigger_is_put_where_it_hides_least():
    objects = np.ones((32, 32), dtype=bool)
    objects[:, 20:] = False
    for seed in range(20):
        stamped = stamp(PATCH, np.zeros((32, 32, 3), np.uint8), objects, np.random.default_rng(seed))
        assert (stamped[objects][:, 1] > 0).sum() <= 12


def test_set_is_refused_when_a_picture_is_gone(world: World):
    with pytest.raises(ShardError, match="1 images that the check has chosen are not there"):
        write_set(
            [a_row("000099999", "anchor", "a")],
            [],
            RiggedSegmenter(),
            source=world.folder / "source",
            folder=world.folder / "repair",
            seed=0,
        )
    assert Manifest(world.folder / "repair" / "shards").summary is None
