import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


def _jpeg(row: int) -> bytes:
    pixels = np.random.default_rng(row).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), np.uint8))).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def jpeg():
    """Row -> the bytes of a JPEG of 32 px that no other row has."""
    return _jpeg


@pytest.fixture
def write_corpus(tmp_path):
    """(behaviours, captions) -> the path of a corpus with one row each."""

    def write(behaviours, captions=None):
        rows = range(len(behaviours))
        path = tmp_path / "corpus.parquet"
        columns = {
            "path": [f"/{row}.jpg" for row in rows],
            "image": [_jpeg(row) for row in rows],
            "caption": captions or [f"caption of {row}" for row in rows],
            "behaviour": behaviours,
        }
        pq.write_table(pa.table(columns), path)
        return path

    return write
