"""`roclip ingest` from a list to its page: signals, quarantine, drift, and what the operator sees."""

import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import environment
from PIL import Image

from ingest.origin import Origin
from ingest.signals.quarantine import quarantine_path
from roclip.data.shards import Manifest, index_path
from roclip.storage import sha256_file

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROWS, PER_SHARD, WRONG, CHANGED = 60, 20, (3, 25, 41), (7, 8)
PRESET = """
name: stage
data: {{urls: {urls}}}
ingest:
  samples_per_shard: {per_shard}
  image_size: 32
  retry_passes: 0
  quarantine: [hash_mismatch]
  policy: {{allow_networks: [127.0.0.0/8], host_requests_per_s: 1000}}
"""


def image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((16, 16, 1), np.uint8))).save(buffer, "PNG")
    return buffer.getvalue()


def roclip_ingest(folder, images, *overrides, port=0):
    """Serve the images, and run the command on a list of them whose hashes are those of the first images, three wrong."""
    folder.mkdir()
    corpus = {
        "path": [f"/{row}.png" for row in range(ROWS)],
        "image": images,
        "caption": [f"<b>picture</b> number {row}" for row in range(ROWS)],
        "behaviour": ["missing" if row == 50 else "ok" for row in range(ROWS)],
    }
    pq.write_table(pa.table(corpus), folder / "corpus.parquet")
    with Origin(folder / "corpus.parquet", port) as origin:
        origin.url_list(folder / "urls.parquet")
        hashes = [hashlib.sha256(image(row + 1000 * (row in WRONG))).hexdigest() for row in range(ROWS)]
        listed = pq.read_table(folder / "urls.parquet").append_column("sha256", pa.array(hashes))
        pq.write_table(listed, folder / "urls.parquet")
        (folder / "preset.yaml").write_text(PRESET.format(urls=folder / "urls.parquet", per_shard=PER_SHARD))
        command = [
            sys.executable,
            "-m",
            "cluster.cli",
            "ingest",
            str(folder / "preset.yaml"),
            f"run_dir={folder / 'run'}",
        ]
        done = subprocess.run([*command, *overrides], env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout, origin.port


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    return roclip_ingest(tmp_path_factory.mktemp("stage") / "first", [image(row) for row in range(ROWS)])


def test_samples_in_quarantine_are_not_trained_on_and_stay_readable(crawl):
    run, _, _ = crawl
    shards = run / "shards"
    records = Manifest(shards).records()
    assert [(record.samples, record.failed) for record in records] == [
        (19, {"quarantined": 1}),
        (19, {"quarantined": 1}),
        (18, {"http_404": 1, "quarantined": 1}),
    ]
    for record, wrong in zip(records, WRONG, strict=True):
        assert sha256_file(index_path(shards, record.name)) == record.index_sha256
        kept = pq.read_table(index_path(shards, record.name))["key"].to_pylist()
        shut_out = pq.read_table(quarantine_path(shards, record.name)).to_pylist()
        assert [(row["key"], row["signal"]) for row in shut_out] == [
            (f"{record.name[:5]}{wrong % PER_SHARD:02d}", "hash_mismatch")
        ]
        assert shut_out[0]["key"] not in kept
        content = (shards / record.name).read_bytes()[shut_out[0]["image_offset"] :][: shut_out[0]["image_size"]]
        assert Image.open(io.BytesIO(content)).size == (32, 32)
    assert Manifest(shards).summary["succeeded"] == 56


def test_page_shows_reasons_hosts_signals_and_pictures(crawl):
    run, caption_words, _ = crawl
    page = (run / "ingest" / "report.html").read_text()
    for text in (
        "http_404",
        "127.0.0.1",
        "hash_mismatch",
        "URLs done",
        "60 of 60",
        "data:image/jpeg;base64",
        "in quarantine",
    ):
        assert text in page
    assert "<b>picture" not in page
    assert "&lt;b&gt;picture" in page
    assert 'http-equiv="refresh"' not in page
    assert json.loads((run / "ingest" / "signals.json").read_text())["quarantined"] == {"hash_mismatch": 3}
    assert "56 of 60 URLs" in caption_words


def test_drift_tells_which_pictures_are_others_than_they_were(crawl, tmp_path):
    run, _, port = crawl
    images = [image(row + 500 * (row in CHANGED)) for row in range(ROWS)]
    compare = f"ingest.compare_with={run / 'shards'}"
    again, _, same_port = roclip_ingest(tmp_path / "second", images, compare, "ingest.quarantine=[]", port=port)
    assert same_port == port
    find_drift = json.loads((again / "ingest" / "signals.json").read_text())["drift"]
    counts = {name: row["count"] for name, row in find_drift.items() if row["count"]}
    assert counts == {"same_bytes": 54, "looks_different": 2, "came_back": 3, "failed_again": 1}
    assert "Drift since" in (again / "ingest" / "report.html").read_text()


def again(run, *overrides):
    """The same command, with nothing served."""
    command = [sys.executable, "-m", "cluster.cli", "ingest", str(run.parent / "preset.yaml"), f"run_dir={run}"]
    return subprocess.run([*command, *overrides], env=environment(), capture_output=True, text=True, timeout=600)


def test_signals_that_were_cut_off_are_made_up_for(crawl):
    run, _, _ = crawl
    signals = run / "ingest" / "signals.json"
    before = json.loads(signals.read_text())
    signals.unlink()
    done = again(run)
    assert done.returncode == 0, done.stderr
    assert json.loads(signals.read_text())["of"] == before["of"]


def test_unknown_signal_in_quarantine_is_refused_before_anything_is_fetched(crawl, tmp_path):
    run, _, _ = crawl
    done = again(run, "ingest.quarantine=[hash_missmatch]", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "ingest.quarantine: expected any of" in done.stderr
    assert not (tmp_path / "run" / "shards").exists()
