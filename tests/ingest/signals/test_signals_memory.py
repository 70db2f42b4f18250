"""What looks at a whole ingest holds as much at 200,000 rows as at half of them, but for a little."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kit import environment

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "support" / "big_ingest.py"
FEW, MANY = 100_000, 200_000


def run(folder, number, act):
    command = [sys.executable, str(SCRIPT), str(folder / "shards"), str(number), act]
    path = environment(OMP_NUM_THREADS="1")
    path["PYTHONPATH"] = f"{SCRIPT.parent}:{path['PYTHONPATH']}"
    done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout else {}


@pytest.fixture(scope="module")
def ingests(tmp_path_factory):
    """Two sealed ingests, by their number of rows."""
    made = {}
    for number in (FEW, MANY):
        made[number] = tmp_path_factory.mktemp(f"ingest{number}")
        run(made[number], number, "make")
    return made


@pytest.mark.parametrize("act", ["duplicates", "suspect", "drift"])
def test_memory_does_not_grow_with_the_rows(ingests, act):
    few, many = (run(ingests[number], number, act) for number in (FEW, MANY))
    assert many["rows"] == MANY
    assert many["peak_mib"] < few["peak_mib"] + 75
    assert many["peak_mib"] < 1024
