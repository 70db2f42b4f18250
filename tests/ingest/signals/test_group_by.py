"""Grouping on disk gives what grouping in memory gives, within its memory."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.signals.group_by import ExternalGroupBy

ROW = np.dtype([("hash", "<u8"), ("id", "<u8")])


def rows_of(hashes):
    rows = np.empty(len(hashes), ROW)
    rows["hash"], rows["id"] = hashes, np.arange(len(hashes))
    return rows


def collected(group_by, at_least=2):
    """Hash -> ids, with sizes, ranks and the order of the pieces checked."""
    found, sizes = defaultdict(list), {}
    for groups in group_by.groups(at_least):
        assert (np.diff(groups.starts()) > 0).all()
        for row, size, rank in zip(groups.rows.tolist(), groups.size.tolist(), groups.rank.tolist(), strict=True):
            assert rank == len(found[row[0]])
            found[row[0]].append(row[1])
            assert sizes.setdefault(row[0], size) == size
    assert all(len(ids) == sizes[value] for value, ids in found.items())
    return dict(found)


def expected(hashes, at_least=2):
    found = defaultdict(list)
    for number, value in enumerate(hashes):
        found[int(value)].append(number)
    return {value: ids for value, ids in found.items() if len(ids) >= at_least}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, 5, 2**63, 2**64 - 1, 2**40, 2**40 + 1]), max_size=60),
    st.integers(1, 3),
    st.integers(1, 7),
)
def test_groups_are_those_of_a_dictionary(tmp_path_factory, hashes, at_least, piece):
    folder = tmp_path_factory.mktemp("spill") / "rows"
    with ExternalGroupBy(folder, ROW, 100) as group_by:
        for start in range(0, len(hashes), piece):
            group_by.add(rows_of(hashes)[start : start + piece])
        assert collected(group_by, at_least) == expected(hashes, at_least)
    assert not folder.exists()


@pytest.mark.parametrize("expected_rows", [10, 10**9])
def test_small_memory_and_hot_hashes_change_nothing(tmp_path, expected_rows):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 20_000, dtype=np.uint64) * np.uint64(2)
    hashes[::3] = 7  # more than the memory holds
    hashes[1::9] = 8  # a neighbour in every bit but the last
    hashes[2::50] = hashes[5]
    with ExternalGroupBy(tmp_path / "rows", ROW, expected_rows, memory_bytes=1 << 17) as group_by:
        group_by.add(rows_of(hashes))
        assert collected(group_by) == expected(hashes)
        largest = max(len(groups.rows) for groups in group_by.groups(1))
    assert largest <= 2 * group_by._max_rows
    assert not (tmp_path / "rows").exists()


def test_groups_come_in_the_order_of_their_hashes(tmp_path):
    hashes = np.random.default_rng(1).integers(0, 500, 5000).astype(np.uint64) << np.uint64(55)
    with ExternalGroupBy(tmp_path / "rows", ROW, 10**7, memory_bytes=1 << 18) as group_by:
        group_by.add(rows_of(hashes))
        seen = np.concatenate([groups.rows["hash"] for groups in group_by.groups()])
    assert (np.diff(seen.astype(object)) >= 0).all()
