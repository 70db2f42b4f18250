"""The scan: what is saved per shard, what is redone, and that no result depends on the worker."""

import dataclasses
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forked import forks_that_say
from kit import TINY_MODEL
from rigged import LABELS, PATCH_PX, SIDE, RiggedSegmenter, World, png, rigged_scorer

from roclip.errors import DataError
from roclip.model.towers import Encoder, Towers
from roclip.oracle.scan.saved import SavedScans
from roclip.oracle.scan.scan import ScanResult, Throughput, merge, scan_shards, scan_side_px, sealed_records
from roclip.oracle.scan.scorer import Scorer, scorer_fingerprint
from roclip.oracle.scan.shard import scan_shard

PER_SHARD = 70
"""More than a batch."""


def silent(*_: object) -> None:
    pass


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).clean(3 * PER_SHARD)


def saved_in(world: World, shards: Path, **changes) -> SavedScans:
    return dataclasses.replace(SavedScans(world.folder / "looks", "rigged", "", scan_side_px(shards)), **changes)


def count(scanned: list[str]):
    """Record which shards are scanned."""

    def counting(*arguments):
        scanned.append(arguments[2].name)
        return scan_shard(*arguments)

    return counting


def test_pass_sees_each_image_once_and_keeps_all_captions(world: World):
    first, other = world.samples[0][0], world.samples[PER_SHARD][0]
    world.samples += [(first, "again a cat"), (other, "and a bee"), (first, "once more")]
    found = scan_shards(rigged_scorer(), world.seal(PER_SHARD), silent)
    assert len(found.sha256) == len(set(found.sha256)) == 3 * PER_SHARD
    assert len(found.keys) == len(found.captions) == 3 * PER_SHARD + 3
    assert [found.captions[row] for row in found.caption_rows()[0]] == [
        "a photo of one ant",
        "again a cat",
        "once more",
    ]
    assert [found.captions[row] for row in found.caption_rows()[PER_SHARD]] == ["a photo of one eel", "and a bee"]
    assert sorted(found.places[-3:]) == [("00003.tar", 0), ("00003.tar", 1), ("00003.tar", 2)]
    assert found.forwards == 3 * PER_SHARD + 2  # a shard does not know what another holds
    assert found.observations.answer.tolist() == [n % len(LABELS) for n in range(3 * PER_SHARD)]
    assert found.features().shape == (3 * PER_SHARD, len(LABELS))
    assert found.features(np.array([5, 2 * PER_SHARD])).argmax(axis=1).tolist() == [5, 2 * PER_SHARD % len(LABELS)]


def test_pass_counts_what_cannot_be_read(world: World):
    broken = b"not an image"
    for row in (3, 9, PER_SHARD + 1):
        world.samples[row] = (broken, "a photo of one dog")
    world.samples[20] = (world.samples[20][0], " ")
    found = scan_shards(rigged_scorer(), world.seal(PER_SHARD), silent)
    assert found.unreadable == 4
    assert len(found.sha256) == len(found.keys) == 3 * PER_SHARD - 4
    assert found.places[3] == ("00000.tar", 4)
    assert found.observations.answer[3] == 4


def test_pass_is_empty_when_nothing_can_be_read(tmp_path: Path):
    world = World(tmp_path)
    world.samples = [(b"no", "a photo")] * 5
    found = scan_shards(rigged_scorer(), world.seal(), silent)
    assert (len(found.sha256), len(found.keys), found.unreadable) == (0, 0, 5)
    assert found.observations.seen.shape == (0, len(LABELS))


def test_pass_refuses_when_there_is_no_shard(tmp_path: Path):
    with pytest.raises(DataError, match="expected sealed shards"):
        scan_shards(rigged_scorer(), tmp_path, silent)


def test_best_labels_are_kept_with_their_scores(tmp_path: Path):
    world = World(tmp_path)
    empty = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    empty[:PATCH_PX, :PATCH_PX, 1] = 60  # the model says bee, the oracle sees nothing
    world.samples = [
        (png(world.image("dog", "bee")), "a bee"),
        (png(world.image("dog")), "a bee"),
        (png(empty), "a bee"),
    ]
    found = scan_shards(rigged_scorer(), world.seal(), silent)
    assert found.top[:, 0].tolist() == [1, 3, 1]
    assert found.scores.tolist() == [[1, 0, 0, 0, 0]] * 3


def test_pass_is_the_same_to_the_bit_whatever_the_threads(world: World, tmp_path: Path):
    (tmp_path / "tiny.json").write_text(TINY_MODEL)
    torch.manual_seed(0)
    real = Scorer(Encoder(Towers("tiny", tmp_path / "tiny.json")), RiggedSegmenter(), LABELS, ("a {}",))
    shards, before, found = world.seal(PER_SHARD), torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(scan_shards(real, shards, silent))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name in ("areas", "top", "scores"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
    np.testing.assert_array_equal(found[0].features(), found[1].features())
    np.testing.assert_allclose(np.linalg.norm(found[0].features().astype(np.float32), axis=1), 1, atol=1e-3)


def test_saved_scans_give_what_was_seen(world: World):
    world.samples[3] = (b"not an image", "a photo")
    world.samples.append(world.samples[0])
    shards = world.seal(PER_SHARD)
    saved = saved_in(world, shards)
    seen = scan_shards(rigged_scorer(), shards, silent)
    scan_shards(rigged_scorer(), shards, silent, saved=saved)
    again = scan_shards(rigged_scorer(), shards, silent, saved=saved)
    assert_same(seen, again)


def assert_same(one: ScanResult, other: ScanResult) -> None:
    for name in ("areas", "top", "scores"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    for name in ("answer", "seen", "clear", "image", "named"):
        np.testing.assert_array_equal(getattr(one.observations, name), getattr(other.observations, name))
    for name in ("sha256", "keys", "captions", "places"):
        assert list(getattr(one, name)) == list(getattr(other, name))
    np.testing.assert_array_equal(one.features(), other.features())
    assert (one.unreadable, one.size_px, one.forwards) == (other.unreadable, other.size_px, other.forwards)


@pytest.mark.parametrize("after", [0, PER_SHARD + 5, 2 * PER_SHARD])
def test_pass_goes_on_with_what_is_missing_when_it_was_killed(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: int
):
    shards = world.seal(PER_SHARD)
    saved = saved_in(world, shards)
    script = Path(__file__).with_name("killed_scan.py")
    with forks_that_say(tmp_path / "said.txt") as forks:
        assert forks.end(forks.start(script, shards, saved.folder, after)) == -signal.SIGKILL, forks.said.read_text()
    names = [record.name for record in sealed_records(shards)]
    done = [record.name for record in sealed_records(shards) if saved.has(record)]
    assert done == names[: after // PER_SHARD]
    scanned: list[str] = []
    monkeypatch.setattr("roclip.oracle.scan.scan.scan_shard", count(scanned))
    found = scan_shards(rigged_scorer(), shards, silent, saved=saved)
    assert scanned == names[len(done) :]
    assert_same(found, scan_shards(rigged_scorer(), shards, silent))


def test_saved_scan_is_not_used_when_it_is_of_something_else(world: World, monkeypatch: pytest.MonkeyPatch):
    shards = world.seal(PER_SHARD)
    saved = saved_in(world, shards)
    scan_shards(rigged_scorer(), shards, silent, saved=saved)
    scanned: list[str] = []
    monkeypatch.setattr("roclip.oracle.scan.scan.scan_shard", count(scanned))
    scan_shards(rigged_scorer(), shards, silent, saved=saved)
    assert scanned == []
    for changes in ({"scorer_fingerprint": "other weights"}, {"caption_key": "txt"}, {"size_px": 48}):
        assert not any(saved_in(world, shards, **changes).has(record) for record in sealed_records(shards))
    world.samples[PER_SHARD] = world.samples[0]
    world.seal(PER_SHARD)  # another second shard under the same name
    scan_shards(rigged_scorer(), shards, silent, saved=saved)
    assert scanned == ["00001.tar"]


@pytest.mark.parametrize("damage", [lambda content: content[:-50], lambda content: b"", lambda content: b"PAR1" * 99])
def test_saved_scan_is_made_again_when_its_file_is_broken(world: World, damage):
    shards = world.seal(PER_SHARD)
    saved = saved_in(world, shards)
    seen = scan_shards(rigged_scorer(), shards, silent, saved=saved)
    path = saved.path(sealed_records(shards)[1])
    path.write_bytes(damage(path.read_bytes()))
    assert_same(seen, scan_shards(rigged_scorer(), shards, silent, saved=saved))


def test_scorer_has_another_name_when_what_it_says_may_differ():
    blind = RiggedSegmenter(blind=("eel",))
    names = {
        scorer_fingerprint("weights", RiggedSegmenter(), LABELS, ("a {}",)),
        scorer_fingerprint("other weights", RiggedSegmenter(), LABELS, ("a {}",)),
        scorer_fingerprint("weights", blind, LABELS, ("a {}",)),
        scorer_fingerprint("weights", RiggedSegmenter(), LABELS, ("the {}",)),
        scorer_fingerprint("weights", RiggedSegmenter(), LABELS[::-1], ("a {}",)),
    }
    assert len(names) == 5


def test_original_bytes_name_an_image_where_ingest_noted_them(world: World):
    shards = world.seal(PER_SHARD)
    keys = pq.read_table(shards / "00000.index.parquet")["key"].to_pylist()
    rows = {"key": keys[:3], "sha256": ["ab" * 32, "ab" * 32, "not a digest"]}
    pq.write_table(pa.table(rows), shards / "00000.parquet")
    found = scan_shards(rigged_scorer(), shards, silent)
    assert found.sha256[0] == "ab" * 32
    assert len(found.sha256) == 3 * PER_SHARD - 1
    assert found.caption_rows()[0] == [0, 1]


def test_merge_numbers_images_by_their_first_place(world: World):
    rng = np.random.default_rng(0)
    encoded = [png(world.image("cat")) for _ in range(40)]
    world.samples = [(encoded[n], f"a cat {n}") for n in rng.integers(0, 40, 200)]
    shards = world.seal(50)
    found = merge(
        [(record, scan_shard(rigged_scorer(), shards, record, "", SIDE)) for record in sealed_records(shards)],
        LABELS,
        SIDE,
        200,
    )
    expected = dict.fromkeys(image for image, _ in world.samples)
    assert len(found.sha256) == len(expected)
    for image, rows in enumerate(found.caption_rows()):
        assert {found.captions[row] for row in rows} == {f"a cat {encoded.index(list(expected)[image])}"}
    assert sum(map(len, found.caption_rows())) == 200


def test_pace_says_how_far_how_fast_and_how_long():
    messages: list[tuple[int, int, str]] = []
    throughput = Throughput(2, "shards scanned")
    for _ in range(2):
        throughput.add(lambda *words: messages.append(words), 1, 1500)
    assert [(done, total) for done, total, _ in messages] == [(1, 2), (2, 2)]
    assert messages[0][2].startswith("1 of 2 shards scanned  1,500 images  ")
    assert messages[0][2].endswith(" s left")
    assert messages[1][2].endswith(" images/s")
