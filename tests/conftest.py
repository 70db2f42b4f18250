"""A scrubbed environment and tiny shards."""

import os
from pathlib import Path

import pytest
from kit import scene_samples, write_shard

from roclip.config import environment_defaults
from roclip.shards import Manifest

environment_defaults()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # nothing here has loaded torch yet; threads that spin cost minutes


@pytest.fixture(autouse=True)
def _no_inherited_world(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three sealed shards of 64 scenes each, ingest ended."""
    root = tmp_path / "shards"
    for number in range(3):
        write_shard(root, number, scene_samples(64 * number, 64))
    Manifest(root).finish({"urls": 192})
    return root
