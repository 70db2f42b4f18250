import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.origin import Origin
from roclip.errors import DataError


def _get(url, timeout=10.0):
    with contextlib.closing(urllib.request.urlopen(url, timeout=timeout)) as answer:
        return answer.read()


def test_origin_behaves_as_the_corpus_says(write_corpus, jpeg, tmp_path):
    behaviours = ["ok", "redirect", "slow", "missing", "broken", "truncated", "hang", "refused", "dead_host"]
    with Origin(write_corpus(behaviours)) as origin:
        origin.url_list(tmp_path / "urls.parquet")
        rows = pq.read_table(tmp_path / "urls.parquet").to_pylist()
        assert [row["caption"] for row in rows] == [f"caption of {row}" for row in range(9)]
        ok, redirect, slow, missing, broken, truncated, hang, refused, dead_host = (row["url"] for row in rows)
        assert _get(ok) == jpeg(0)
        assert _get(redirect) == jpeg(1)
        assert _get(slow) == jpeg(2)
        assert not _get(broken).startswith(b"\xff\xd8")
        with pytest.raises(urllib.error.HTTPError, match="404") as error:
            _get(missing)
        error.value.close()
        with pytest.raises(Exception, match="IncompleteRead"):
            _get(truncated)
        with pytest.raises(TimeoutError):
            _get(hang, timeout=0.5)
        with pytest.raises(urllib.error.URLError, match="refused"):
            _get(refused)
        with pytest.raises(urllib.error.URLError):
            _get(dead_host)


def test_origin_takes_another_port_when_the_wish_is_taken(write_corpus, jpeg):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wish = taken.getsockname()[1]
        with Origin(write_corpus(["ok"]), port=wish) as origin:
            assert origin.port != wish
            assert _get(origin.url("/0.jpg")) == jpeg(0)


def test_origin_gets_the_port_it_wishes_when_that_is_free(write_corpus):
    with Origin(write_corpus(["ok"])) as first:
        port = first.port
    with Origin(write_corpus(["ok"]), port=port) as second:
        assert second.port == port


def test_origin_ends_when_its_parent_is_killed(write_corpus):
    script = (
        "import sys, time; from pathlib import Path; from ingest.origin import Origin\n"
        "with Origin(Path(sys.argv[1])) as origin: print(origin.port, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(write_corpus(["ok"]))]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        port = int(parent.stdout.readline())
        _get(f"http://127.0.0.1:{port}/0.jpg")
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        try:
            _get(f"http://127.0.0.1:{port}/0.jpg")
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("the origin still answers 10 s after its parent was killed")


def test_origin_does_not_start_when_the_corpus_lacks_a_column(tmp_path, capfd):
    pq.write_table(pa.table({"path": ["/0.jpg"], "image": [b""]}), tmp_path / "corpus.parquet")
    with pytest.raises(DataError, match="the origin did not start"), Origin(tmp_path / "corpus.parquet"):
        pass
    assert "expected the columns path, image, caption, behaviour" in capfd.readouterr().err
