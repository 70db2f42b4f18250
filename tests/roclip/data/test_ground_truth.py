"""Which samples of a run are poisoned, joined with what arrived in its shards."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from kit import scene_samples, write_shard

from roclip.data.ground_truth import TRUTH, poisoned_samples, write_truth
from roclip.data.shards import sample_key

PER_SHARD = 100


def poison(row: int, attack: str = "backdoor") -> dict:
    labels = {"target_label": "ball", "source_label": "car", "caption": "a ball", "trigger_box": None}
    return {"key": sample_key(row, PER_SHARD), "attack": attack, "group": row, **labels}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two shards with the rows 0 to 3 and 100 to 103."""
    for number in range(2):
        write_shard(tmp_path / "run" / "shards", number, scene_samples(4 * number, 4, size_px=32), PER_SHARD)
    return tmp_path / "run"


def test_only_poisons_that_arrived_are_told(run: Path):
    write_truth(run / "origin" / TRUTH, [poison(102), poison(2, "targeted"), poison(50), poison(201)])
    assert poisoned_samples(run).to_pydict() == {
        "id": [2, 102],
        "attack": ["targeted", "backdoor"],
        "target_label": ["ball", "ball"],
        "group": [2, 102],
    }


def test_shards_elsewhere_bring_their_own_truth(run: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(f"data: {{shards: {run / 'shards'}}}\nof_another_version: 1\n")
    write_truth(run / "shards" / TRUTH, [poison(1)])
    assert poisoned_samples(other)["id"].to_pylist() == [1]


def test_table_is_empty_where_nothing_is_known(run: Path, tmp_path: Path):
    for folder in (run, tmp_path / "nowhere"):
        table = poisoned_samples(folder)
        assert (len(table), table.schema.names) == (0, ["id", "attack", "target_label", "group"])
        assert str(table.schema.field("id").type) == "int64"


def test_truth_is_ordered_by_id_and_keeps_rows_of_a_list(run: Path):
    write_truth(run / TRUTH, [{**poison(7), "id": 9}, {**poison(8), "id": 4}])
    assert pq.read_table(run / TRUTH)["id"].to_pylist() == [4, 9]
