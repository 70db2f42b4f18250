"""Two ingests of one list, compared: each change is named for what it is."""

from collections import Counter

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from sealed import seal, seal_all

from ingest.signals.drift import CHANGES, DRIFT, EXAMPLES, SCHEMA, find_drift
from roclip.errors import ShardError

FAILED = {"status": "failed_to_download", "sha256": None, "phash": None}


def row(n, **changed):
    rng = np.random.default_rng(n)
    return {
        "url": f"http://host.example/{n}.jpg",
        "caption": f"caption {n}",
        "sha256": f"{n + 1:016x}{0:048x}",
        "phash": int(rng.integers(0, 2**64, dtype=np.uint64)),
        **changed,
    }


def flipped(value, bits):
    return value ^ ((1 << bits) - 1)


def compared(tmp_path, old, new, per_shard=100, **options):
    found = find_drift(
        seal_all(tmp_path / "old", old, per_shard),
        seal_all(tmp_path / "new", new, per_shard),
        tmp_path / "work",
        **options,
    )
    table = pq.read_table(tmp_path / "work" / DRIFT)
    assert table.schema == SCHEMA
    return found, table.to_pylist()


def test_each_change_is_named(tmp_path):
    same, near, other = row(0), row(1), row(2)
    old = [same, near, other, row(3), row(4, **FAILED), row(5, **FAILED), row(6), row(7, phash=None), row(8)]
    new = [
        row(9),
        row(8, caption="Caption   8"),
        row(7, phash=None, sha256="f" * 64),
        row(5, **FAILED),
        row(4),
        row(3, error_message="HTTP Error 404: Not Found", **FAILED),
        {**other, "sha256": "e" * 64, "phash": flipped(other["phash"], 30), "caption": "something else"},
        {**near, "sha256": "d" * 64, "phash": flipped(near["phash"], 8)},
        {**same, "url": "HTTP://HOST.example:80/0.jpg#fragment"},
    ]
    found, rows = compared(tmp_path, old, new)
    assert found.counts == {
        "same_bytes": 2,
        "looks_same": 1,
        "looks_different": 1,
        "other_bytes": 1,
        "gone": 1,
        "came_back": 1,
        "failed_again": 1,
        "only_old": 1,
        "only_new": 1,
    }
    assert list(found.counts) == list(CHANGES)
    assert found.captions_changed == 1
    assert found.reasons == {"http_404": 1}
    by_change = {each["change"]: each for each in rows}
    assert set(by_change) == set(CHANGES) - {"same_bytes", "failed_again"}
    assert by_change["looks_different"]["distance"] == 30
    assert by_change["looks_different"]["caption_changed"]
    assert by_change["looks_different"]["url"] == other["url"]
    assert by_change["looks_different"]["old_key"] == "0000002"
    assert by_change["looks_different"]["new_key"] == "0000006"
    assert by_change["looks_same"]["distance"] == 8
    assert by_change["other_bytes"]["distance"] is None
    assert by_change["gone"]["reason"] == "http_404"
    assert by_change["only_new"]["old_key"] is by_change["only_new"]["old_shard"] is None
    assert by_change["only_old"]["new_key"] is by_change["only_old"]["new_shard"] is None
    assert by_change["only_old"]["url"] == "http://host.example/6.jpg"
    assert by_change["only_old"]["old_shard"] == "00000.tar"


def test_a_later_pass_that_got_it_counts_as_got(tmp_path):
    old = [row(0), row(1)]
    new = [row(0, **FAILED), row(1, **FAILED), row(0), row(1, **FAILED)]
    found, _ = compared(tmp_path, old, new, per_shard=2)
    assert {change: n for change, n in found.counts.items() if n} == {"same_bytes": 1, "gone": 1}


@pytest.mark.parametrize("memory_bytes", [1 << 16, 1 << 28])
def test_the_join_is_that_of_a_dictionary(tmp_path, memory_bytes):
    rng = np.random.default_rng(0)

    def some():
        rows = []
        for n in rng.permutation(900)[:700].tolist():
            change = {"phash": flipped(row(n)["phash"], int(rng.integers(40))), "sha256": f"{n:064x}"[::-1]}
            rows.append(row(n, **(FAILED if rng.random() < 0.2 else change if rng.random() < 0.4 else {})))
        return rows

    old, new = some(), some()
    found, rows = compared(tmp_path, old, new, memory_bytes=memory_bytes)
    expected = Counter()
    sides = [{each["url"]: each for each in side} for side in (old, new)]
    for url in sides[0].keys() | sides[1].keys():
        then, now = (side.get(url) for side in sides)
        good = [each is not None and each.get("status") is None for each in (then, now)]
        if then is None or now is None:
            change = "only_new" if then is None else "only_old"
        elif not all(good):
            change = "gone" if good[0] else "came_back" if good[1] else "failed_again"
        elif then["sha256"] == now["sha256"]:
            change = "same_bytes"
        else:
            change = "looks_same" if bin(then["phash"] ^ now["phash"]).count("1") <= 8 else "looks_different"
        expected[change] += 1
    assert {change: n for change, n in found.counts.items() if n} == expected
    assert Counter(each["change"] for each in rows) == {
        n: c for n, c in expected.items() if n not in ("same_bytes", "failed_again")
    }
    far = [example.distance for example in found.examples["looks_different"]]
    assert (
        far
        == sorted((each["distance"] for each in rows if each["change"] == "looks_different"), reverse=True)[:EXAMPLES]
    )


def test_an_ingest_compared_with_itself_has_not_changed(tmp_path):
    seal_all(tmp_path / "old", [row(n) for n in range(50)])
    found = find_drift(tmp_path / "old", tmp_path / "old", tmp_path / "work")
    assert found.counts["same_bytes"] == sum(found.counts.values()) == 50
    assert not pq.read_table(tmp_path / "work" / DRIFT).num_rows


def test_the_order_of_sealing_and_a_store_change_no_byte(tmp_path):
    old, new = [row(n) for n in range(200)], [row(n, sha256="a" * 64) for n in range(100, 300)]
    seal_all(tmp_path / "old", old)
    for folder, order in (("new", (0, 1)), ("again", (1, 0))):
        for number in order:
            seal(tmp_path / folder, number, new[number * 100 : number * 100 + 100], 100)
    find_drift(tmp_path / "old", tmp_path / "new", tmp_path / "work")
    find_drift(tmp_path / "old", tmp_path / "again", tmp_path / "work2")
    expected = (tmp_path / "work" / DRIFT).read_bytes()
    assert (tmp_path / "work2" / DRIFT).read_bytes() == expected
    store = fsspec.filesystem("memory")
    try:
        for path in (tmp_path / "old").rglob("*"):
            if path.is_file():
                store.pipe_file(f"/old/{path.relative_to(tmp_path / 'old')}", path.read_bytes())
        find_drift("memory://old", tmp_path / "new", "memory://drift-work")
        assert store.cat_file(f"/drift-work/{DRIFT}") == expected
    finally:
        store.rm("/old", recursive=True)
        store.rm("/drift-work", recursive=True)


def test_a_broken_parquet_is_an_error_that_names_it(tmp_path):
    seal_all(tmp_path / "old", [row(0)])
    (tmp_path / "old" / "00000.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ShardError, match=r"00000\.parquet"):
        find_drift(tmp_path / "old", tmp_path / "old", tmp_path / "work")
