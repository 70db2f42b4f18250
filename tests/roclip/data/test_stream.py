import pytest
import torch
from kit import scene_samples, write_shard

from roclip.data.shards import Manifest
from roclip.data.stream import Stream, StreamSettings, take_snapshot, wait_for_shards
from roclip.errors import DataError, ShardError


def tokenize(captions):
    return torch.tensor([[len(caption)] for caption in captions])


def stream(shards, rank=0, world_size=1, **changes):
    settings = {"image_size": 64, "global_batch_size": 24, "seed": 0, "streams": 4, "shuffle_buffer": 16} | changes
    return Stream(shards, StreamSettings(**settings), tokenize=tokenize, rank=rank, world_size=world_size)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_the_batches_of_one_rank(shards, world_size):
    snapshot = take_snapshot(Manifest(shards))
    alone = list(stream(shards).epoch(snapshot, 1))
    ranks = [list(stream(shards, rank, world_size).epoch(snapshot, 1)) for rank in range(world_size)]
    assert len(alone) == 192 // 24
    for number, batch in enumerate(alone):
        assert torch.equal(torch.cat([rank[number].ids for rank in ranks]), batch.ids)
        assert torch.equal(torch.cat([rank[number].images for rank in ranks]), batch.images)


@pytest.mark.parametrize(("world_size", "pieces"), [(5, 1), (7, 2), (3, 4), (30, 1)])
def test_ranks_that_do_not_divide_the_batch_see_the_same_samples(shards, world_size, pieces):
    snapshot = take_snapshot(Manifest(shards))
    alone = list(stream(shards).epoch(snapshot, 1))
    ranks = [list(stream(shards, rank, world_size, pieces=pieces).epoch(snapshot, 1)) for rank in range(world_size)]
    for number, batch in enumerate(alone):
        parts = [rank[number] for rank in ranks]
        assert {len(part.ids) % pieces for part in parts} == {0}
        assert len({len(part.ids) for part in parts}) == 1
        assert torch.equal(torch.cat([part.ids[part.valid] for part in parts]), batch.ids)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_padding_gives_the_last_samples_a_step_of_their_own(shards, world_size):
    snapshot = take_snapshot(Manifest(shards))
    settings = {"global_batch_size": 40, "last_batch": "pad"}
    ranks = [list(stream(shards, rank, world_size, **settings).epoch(snapshot, 1)) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {5}
    seen = [int(sample) for rank in ranks for batch in rank for sample in batch.ids[batch.valid]]
    assert sorted(seen) == sorted({int(sample) for sample in seen})
    assert len(seen) == 192
    whole = stream(shards, global_batch_size=200, last_batch="pad").plan(snapshot, 1)
    assert (whole.steps, whole.samples) == (1, 192)


def test_samples_of_a_step_are_named_for_people(shards):
    snapshot = take_snapshot(Manifest(shards))
    here = stream(shards)
    batch = list(here.epoch(snapshot, 2))[3]
    names = here.where(here.plan(snapshot, 2), 3)
    assert [int(name.split(" ")[1]) for name in names] == batch.ids.tolist()
    assert {name.split(" ")[0] for name in names} <= set(snapshot.names)


def test_epoch_goes_on_from_a_step(shards):
    snapshot = take_snapshot(Manifest(shards))
    whole = [batch.ids for batch in stream(shards).epoch(snapshot, 3)]
    rest = [batch.ids for batch in stream(shards).epoch(snapshot, 3, first_step=5)]
    assert len(rest) == len(whole) - 5
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[5:], strict=True))


def test_loader_workers_give_the_same_batches(shards):
    snapshot = take_snapshot(Manifest(shards))
    here = [batch.ids for batch in stream(shards).epoch(snapshot, 1)]
    there = [batch.ids for batch in stream(shards, workers=1).epoch(snapshot, 1)]
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_snapshot_keeps_its_shards_while_others_are_published(shards):
    manifest = Manifest(shards)
    before = take_snapshot(manifest)
    write_shard(shards, 3, scene_samples(500, 10))
    assert take_snapshot(manifest, before.names) == before
    assert take_snapshot(manifest).samples == before.samples + 10
    with pytest.raises(ShardError, match="00009"):
        take_snapshot(manifest, ["00009.tar"])


def test_broken_samples_are_counted_by_reason_and_left_out(tmp_path):
    good = scene_samples(0, 5)
    bad = [(b"no image", "a caption"), (good[0][0], " "), (good[0][0][:200], "cut")]
    write_shard(tmp_path, 0, good + bad)
    snapshot = take_snapshot(Manifest(tmp_path))
    (batch,) = stream(tmp_path, global_batch_size=8).epoch(snapshot, 1)
    assert int(batch.valid.sum()) == 5
    assert sorted(reason for _, reason in batch.bad) == ["empty_caption", "undecodable_image", "undecodable_image"]
    assert all(name.startswith("00000.tar 00000") for name, _ in batch.bad)


def test_tar_cut_after_sealing_gives_bad_samples_not_a_crash(tmp_path):
    write_shard(tmp_path, 0, scene_samples(0, 8))
    tar = tmp_path / "00000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    (batch,) = stream(tmp_path, global_batch_size=8).epoch(take_snapshot(Manifest(tmp_path)), 1)
    assert 0 < int(batch.valid.sum()) < 8
    assert {reason for _, reason in batch.bad} == {"truncated_tar"}


def test_too_few_samples_for_a_batch_is_an_error(shards):
    with pytest.raises(DataError, match="global batch of 500"):
        stream(shards, global_batch_size=500).plan(take_snapshot(Manifest(shards)), 1)


def test_waiting_ends_when_ingest_ended_without_a_shard(tmp_path):
    Manifest(tmp_path).finish({})
    with pytest.raises(DataError, match="got 0"):
        wait_for_shards(Manifest(tmp_path), 1, wait_s=60)


def test_waiting_ends_with_fewer_shards_when_ingest_ended(shards):
    wait_for_shards(Manifest(shards), 10, wait_s=0)
