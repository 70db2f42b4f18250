"""Later passes: which rows they have, and how the ledger numbers them."""

import dataclasses
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingest.folder.ledger import LEDGER, Ledger, Segment
from ingest.folder.retries import RETRY_OF, retry_parts, transient_reasons
from ingest.lists.same_list import check_same, rows_sha256
from ingest.lists.sources import split
from roclip.data.shards import ShardRecord, sample_key
from roclip.errors import DataError, RunLockedError, ShardError

OUTCOMES = {
    "ok": ("success", None, ""),
    "gone": ("failed_to_download", "HTTP Error 404: Not Found", "http_404"),
    "slow": ("failed_to_download", "<urlopen error timed out>", "timeout"),
    "busy": ("failed_to_download", "HTTP Error 503: Busy", "http_503"),
    "mute": ("failed_to_download", "<urlopen error timed out>", "empty_caption"),
}
TRANSIENT = ("timeout", "http_503")


def _shards(root, outcomes, per_shard):
    """What an ingest of these rows leaves, with the rows of each parquet in the wrong order."""
    records = []
    for number, start in enumerate(range(0, len(outcomes), per_shard)):
        rows = [
            {
                "url": f"http://h/{row}",
                "caption": "" if outcomes[row] == "mute" else f"caption {row}",
                "page": f"page {row}",
                "key": sample_key(row, per_shard),
                "status": OUTCOMES[outcomes[row]][0],
                "error_message": OUTCOMES[outcomes[row]][1],
                "sha256": None,
            }
            for row in range(start, min(start + per_shard, len(outcomes)))
        ]
        columns = ("url", "caption", "page", "key", "status", "error_message", "sha256")
        table = pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in columns})
        pq.write_table(table.take(list(reversed(range(len(rows))))), root / f"{number:05d}.parquet")
        failed = Counter(OUTCOMES[outcomes[start + n]][2] for n in range(len(rows)))
        samples = failed.pop("", 0)
        records.append(ShardRecord(f"{number:05d}.tar", samples, 1, "0", "0", len(rows), dict(failed)))
    return records


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(sorted(OUTCOMES)), max_size=60), st.integers(2, 20), st.integers(1, 15), st.data())
def test_pass_has_each_row_that_may_do_better_once_whatever_is_asked_for_first(tmp_path, outcomes, shard, part, data):
    records = _shards(tmp_path, outcomes, shard)
    reasons = transient_reasons(records)
    assert set(reasons) == {OUTCOMES[outcome][2] for outcome in outcomes} & set(TRANSIENT)
    failed = [row for row, outcome in enumerate(outcomes) if OUTCOMES[outcome][2] in TRANSIENT]
    parts = list(retry_parts(tmp_path, records, reasons, part, lambda _: True))
    assert [piece.position for piece in parts] == list(range(-(-len(failed) // part)))
    assert [url for piece in parts for url in piece.table["url"].to_pylist()] == [f"http://h/{row}" for row in failed]
    for piece in parts:
        rows = failed[piece.position * part :][: len(piece.table)]
        assert piece.table.column_names == ["url", "caption", "page", RETRY_OF]
        assert piece.table["page"].to_pylist() == [f"page {row}" for row in rows]
        assert piece.table[RETRY_OF].to_pylist() == [sample_key(row, shard) for row in rows]
        assert piece.retried == Counter(OUTCOMES[outcomes[row]][2] for row in rows)
    chosen = data.draw(st.sets(st.sampled_from([piece.position for piece in parts]))) if parts else set()
    some = list(retry_parts(tmp_path, records, reasons, part, lambda position: position in chosen))
    assert [piece.table for piece in some] == [parts[position].table for position in sorted(chosen)]


def test_parquet_that_says_other_than_its_record_is_named(tmp_path):
    (record,) = _shards(tmp_path, ["slow", "ok"], 5)
    more = dataclasses.replace(record, failed={"timeout": 2})
    with pytest.raises(ShardError, match=r"00000\.parquet: expected 2 rows with a transient failure.* got 1"):
        list(retry_parts(tmp_path, [more], ["timeout"], 5, lambda _: True))
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ShardError, match=r"ingest\.retry_passes=0"):
        list(retry_parts(tmp_path, [record], ["timeout"], 5, lambda _: True))


def test_ledger_numbers_segments_one_after_another(tmp_path):
    ledger = Ledger(tmp_path)
    first = ledger.add(Segment(0, 10, list_name="laion", digest="a"))
    assert (first.shards, first.rows_of(0)) == (None, None)
    first = ledger.end(first, 25)
    assert (first.shards, [first.rows_of(number) for number in range(4)]) == (3, [10, 10, 5, -5])
    assert ledger.next_shard == 3
    again = ledger.add(Segment(3, 10, pass_number=1, reasons=("timeout",), rows=4))
    assert ledger.next_shard == 4
    told = Ledger(tmp_path)
    assert told.segments == [first, again]
    assert told.lists == [first]
    with pytest.raises(DataError, match=r"at most 100000 shards"):
        told.add(Segment(99_999, 10, rows=11))
    assert again.numbers(dict.fromkeys([5, 3, 2], ShardRecord("x.tar", 0, 0, "", "", 0))) == [3]


def test_ledger_is_not_written_without_the_lease(tmp_path):
    def lost():
        raise RunLockedError("lost")

    with pytest.raises(RunLockedError):
        Ledger(tmp_path, lost).add(Segment(0, 10))
    assert not (tmp_path / LEDGER).exists()
    (tmp_path / LEDGER).write_text(json.dumps({"segments": [{"unknown": 1, "reasons": []}]}))
    with pytest.raises(DataError, match="expected the ledger"):
        Ledger(tmp_path)


class _List:
    def __init__(self, rows):
        self.table = pa.table({"url": rows, "caption": [f"of {row}" for row in rows]})

    def parts(self, samples_per_shard, start_row=0):
        yield from split(self.table.slice(start_row), samples_per_shard)


def _records(rows, per_shard):
    return {
        part.number: ShardRecord(
            f"{part.number:05d}.tar",
            0,
            0,
            "",
            "",
            len(part.table),
            rows_sha256=rows_sha256(part.table, ("url", "caption")),
        )
        for part in _List(rows).parts(per_shard)
    }


@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 12), st.data())
def test_list_is_the_same_when_it_begins_with_what_was_ingested(rows, more, per_shard, data):
    before = [f"http://h/{row}" for row in range(rows)]
    sealed = _records(before, per_shard)
    sealed = {number: sealed[number] for number in data.draw(st.sets(st.sampled_from(sorted(sealed))))}
    segment = Segment(0, per_shard, rows=rows)
    grown = [*before, *(f"http://new/{row}" for row in range(more))]
    check_same(_List(grown), segment, sealed, ("url", "caption"), "here")
    if sealed:
        number = data.draw(st.sampled_from(sorted(sealed)))
        changed = list(grown)
        changed[number * per_shard] = "http://evil/"
        with pytest.raises(DataError, match=f"{number:05d}.tar was sealed for .* other rows there"):
            check_same(_List(changed), segment, sealed, ("url", "caption"), "here")
        last = max(sealed)
        with pytest.raises(DataError, match="was sealed for"):
            check_same(_List(grown[: last * per_shard]), segment, sealed, ("url", "caption"), "here")


def test_rows_differ_when_text_moves_between_columns():
    one, other = pa.table({"url": ["ab"], "caption": ["c"]}), pa.table({"url": ["a"], "caption": ["bc"]})
    assert rows_sha256(one, ("url", "caption")) != rows_sha256(other, ("url", "caption"))
