"""Duplicates are those that exhaustive comparison finds, whatever the order and the size of the shards."""

import hashlib
import itertools
from collections import defaultdict

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sealed import seal, seal_all

from ingest.signals import near_duplicates, normal_forms
from ingest.signals.duplicates import DUPLICATES, KINDS, SCHEMA, find_duplicates
from ingest.signals.group_by import ExternalGroupBy
from ingest.signals.near_duplicates import bits, is_informative, near_duplicate_groups
from roclip.data.shards import Manifest
from roclip.errors import ShardError


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def components(values, distance=3):
    """Value -> smallest value that it is connected with, by comparing all with all."""
    root = {value: value for value in values}

    def find(value):
        while root[value] != value:
            value = root[value]
        return value

    for a, b in itertools.combinations(sorted(root), 2):
        if bin(a ^ b).count("1") <= distance:
            low, high = sorted((find(a), find(b)))
            root[high] = low
    return {value: find(value) for value in values}


def grouped(folder, values):
    group_by = ExternalGroupBy(folder / "hashes", np.dtype([("hash", "<u8"), ("phash", "<u8")]), len(values))
    rows = np.empty(len(values), group_by.dtype)
    rows["phash"] = values
    rows["hash"] = normal_forms.mix(rows["phash"])
    group_by.add(rows)
    return group_by


def near(rng, value, flips):
    for bit in rng.choice(64, flips, replace=False):
        value ^= 1 << int(bit)
    return value


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60))
def test_looks_are_the_components_of_an_exhaustive_search(tmp_path_factory, seed, number):
    rng = np.random.default_rng(seed)
    values = [int(value) for value in rng.integers(0, 2**64, 8, dtype=np.uint64)]
    for _ in range(number):
        values.append(near(rng, values[rng.integers(len(values))], int(rng.integers(0, 6))))
    values = [value for value in values if is_informative(np.array([value], np.uint64))[0]]
    folder = tmp_path_factory.mktemp("looks")
    with grouped(folder, values) as group_by:
        found = near_duplicate_groups(group_by, folder)
    expected = components(values)
    assert dict(zip(values, found(np.array(values, np.uint64)).tolist(), strict=True)) == expected
    assert not found.dropped
    assert not found.truncated


def test_ones_are_counted():
    values = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    assert bits(values).tolist() == [bin(value).count("1") for value in values.tolist()]


def test_hashes_that_say_nothing_connect_nothing(tmp_path):
    with grouped(tmp_path, [0, 1, 2, 3, 2**64 - 1, 2**64 - 2]) as group_by:
        found = near_duplicate_groups(group_by, tmp_path)
    assert not len(found.linked)


def test_a_crowd_in_one_table_costs_bounded_work_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(near_duplicates, "WINDOW", 4)
    rng = np.random.default_rng(0)
    crowd = [(0xABCDEF << 40) | int(value) for value in rng.integers(0, 2**40, 500)]  # alike in the first 24 bits
    values = [*crowd, near(rng, crowd[3], 2)]
    with grouped(tmp_path, values) as group_by:
        found = near_duplicate_groups(group_by, tmp_path)
    assert found.truncated > 0
    pair = found(np.array([crowd[3], values[-1]], np.uint64)).tolist()
    assert pair[0] == pair[1]  # another table has it


def test_links_beyond_the_memory_are_counted(tmp_path):
    values = [(n << 20) | bit for n in range(0xF0F0F0, 0xF0F0F0 + 40 * 64, 64) for bit in (0xF0F00, 0xF0F01)]
    with grouped(tmp_path, values) as group_by:
        found = near_duplicate_groups(group_by, tmp_path, memory_bytes=64 * 10)
    assert len(found.linked) == 10
    assert found.dropped > 0


def rows_with_duplicates(rng, number):
    phashes = [int(value) for value in rng.integers(0, 2**64, number, dtype=np.uint64)]
    rows = []
    for n in range(number):
        copy = int(rng.integers(n)) if n and rng.random() < 0.3 else n
        rows.append(
            {
                "url": f"http://host{copy if rng.random() < 0.5 else n}.example/a.jpg",
                "caption": f"caption number {copy if rng.random() < 0.5 else n}",
                "sha256": sha(str(copy if rng.random() < 0.5 else n)),
                "phash": near(rng, phashes[copy], int(rng.integers(0, 3))),
                "status": "success" if rng.random() < 0.9 else "failed_to_download",
            }
        )
    return rows


def groups_in(path):
    table = pq.read_table(path)
    assert table.schema == SCHEMA
    found = defaultdict(lambda: defaultdict(set))
    for row in table.to_pylist():
        found[row["kind"]][row["group"]].add((row["shard"], row["key"]))
    names = table["group"].to_pylist()
    assert len(set(names)) == sum(1 for _ in itertools.groupby(names))  # groups are together
    return {kind: {frozenset(group) for group in groups.values()} for kind, groups in found.items()}


def exhaustive(rows, per_shard):
    found = {kind: defaultdict(set) for kind in KINDS}
    near_group = components([row["phash"] for row in rows if row["status"] == "success"])
    for n, row in enumerate(rows):
        if row["status"] != "success":
            continue
        place = (
            f"{n // per_shard:05d}.tar",
            f"{n // per_shard * 10 ** len(str(per_shard - 1)) + n % per_shard:0{5 + len(str(per_shard - 1))}d}",
        )
        for kind, value in (
            ("url", row["url"]),
            ("bytes", row["sha256"]),
            ("caption", row["caption"]),
            ("near", near_group[row["phash"]]),
        ):
            found[kind][value].add(place)
    return {kind: {frozenset(g) for g in groups.values() if len(g) > 1} for kind, groups in found.items()}


@pytest.mark.parametrize("memory_bytes", [1 << 16, 1 << 28])
def test_duplicates_are_those_of_an_exhaustive_search(tmp_path, memory_bytes):
    rows = rows_with_duplicates(np.random.default_rng(3), 700)
    found = find_duplicates(seal_all(tmp_path / "shards", rows, 100), tmp_path / "work", memory_bytes=memory_bytes)
    groups = groups_in(tmp_path / "work" / DUPLICATES)
    expected = exhaustive(rows, 100)
    assert groups == expected
    for kind, count in found.counts.items():
        assert (count.groups, count.samples) == (len(expected[kind]), sum(map(len, expected[kind])))
        assert count.surplus > 0
    assert found.samples == sum(row["status"] == "success" for row in rows)
    assert [path.name for path in (tmp_path / "work").iterdir()] == [DUPLICATES]


def test_the_order_in_which_shards_were_sealed_changes_no_byte(tmp_path):
    rows = rows_with_duplicates(np.random.default_rng(4), 300)
    for folder, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        for number in order:
            seal(tmp_path / folder, number, rows[number * 100 : number * 100 + 100], 100)
        find_duplicates(tmp_path / folder, tmp_path / f"{folder}-work")
    assert (tmp_path / "a-work" / DUPLICATES).read_bytes() == (tmp_path / "b-work" / DUPLICATES).read_bytes()


def test_urls_and_captions_are_compared_in_their_normal_form(tmp_path):
    same = ["http://Host.example:80/A.jpg#x", "HTTP://host.example/A.jpg", " http://host.example/A.jpg"]
    other = [
        "http://host.example/a.jpg",
        "https://host.example/A.jpg",
        "http://host.example:8080/A.jpg",
        "http://[bad",
        "",
    ]
    captions = ["A  Red\tShoe", "a red shoe ", "a red ｓhoe", "a red shoes"]
    rows = [{"url": url, "caption": f"{n}"} for n, url in enumerate([*same, *other, ""])]
    rows += [{"url": f"http://x.example/{n}", "caption": caption} for n, caption in enumerate(captions)]
    found = find_duplicates(seal_all(tmp_path / "shards", rows), tmp_path / "work")
    assert found.counts["url"].groups == 1
    assert found.counts["url"].samples == 3
    assert found.counts["caption"].samples == 3
    assert not found.counts["bytes"].samples  # no hashes: nothing is known
    assert not found.counts["near"].samples


def test_no_samples_are_no_duplicates(tmp_path):
    Manifest(tmp_path / "shards")
    found = find_duplicates(tmp_path / "shards", tmp_path / "work")
    assert found.samples == 0
    assert not pq.read_table(tmp_path / "work" / DUPLICATES).num_rows


def test_shards_and_result_may_be_on_a_store(tmp_path):
    rows = rows_with_duplicates(np.random.default_rng(5), 200)
    seal_all(tmp_path / "shards", rows, 100)
    store = fsspec.filesystem("memory")
    try:
        for path in (tmp_path / "shards").rglob("*"):
            if path.is_file():
                store.pipe_file(f"/dup/{path.relative_to(tmp_path / 'shards')}", path.read_bytes())
        find_duplicates("memory://dup", "memory://dup-work")
        find_duplicates(tmp_path / "shards", tmp_path / "work")
        assert store.cat_file(f"/dup-work/{DUPLICATES}") == (tmp_path / "work" / DUPLICATES).read_bytes()
    finally:
        store.rm("/dup", recursive=True)
        store.rm("/dup-work", recursive=True)


def test_a_shard_without_its_parquet_is_an_error_that_names_it(tmp_path):
    seal_all(tmp_path / "shards", [{"url": "http://a.example/", "caption": "a"}])
    (tmp_path / "shards" / "00000.parquet").unlink()
    with pytest.raises(ShardError, match=r"00000\.parquet"):
        find_duplicates(tmp_path / "shards", tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_keys_that_are_no_numbers_are_an_error(tmp_path):
    seal(tmp_path / "shards", 0, [{"url": "http://a.example/", "caption": "a", "key": "../../etc"}])
    with pytest.raises(ShardError, match="numbers"):
        find_duplicates(tmp_path / "shards", tmp_path / "work")
