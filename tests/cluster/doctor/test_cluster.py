"""The doctor on three Ray nodes, of which one has another version, few open files and no run directory to write to."""

import contextlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
import psutil
import pytest
import s3fs
from kit import REPOSITORY, environment, free_port, preset
from ray_nodes import RayNodes
from s3 import s3_server

from cluster.doctor.actors import Finding, connected
from cluster.doctor.checks import Check, exit_code
from cluster.doctor.cluster import ClockReading, by_check, clock_check, clock_reading, dashboard_check, examine
from cluster.doctor.node import NodeExam, gpu_check, source_digest
from roclip.config import Config, load_config

pytestmark = pytest.mark.ray
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs root and unshare (Debian: util-linux) for a mount",
)
COMMAND = [sys.executable, "-m", "cluster.cli", "doctor"]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rd", ignore_cleanup_errors=True) as path:  # short: sockets lie in it
        (Path(path) / "runs").mkdir()
        yield Path(path)


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    text = f"runs: {folder}/runs\ndata: {{scenes: 1000}}\nmodel: {{name: tiny}}\npool: {{size: 64}}\n"
    text += "train: {global_batch_size: 64}\ncluster: {workers: 3}\n"
    return load_config(preset(folder, text), [])


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[RayNodes]:
    """A head with an open dashboard, a good node, and a bad one."""
    other = folder / "other"
    for package in ("cluster", "ingest", "roclip"):
        shutil.copytree(REPOSITORY / package, other / package)
    with (other / "roclip" / "errors.py").open("a") as file:
        file.write("OTHER = True\n")
    read_only = f'mount -t tmpfs -o ro none "{folder}/runs" && exec "$@"'
    before = ("unshare", "--mount", "sh", "-c", read_only, "sh", "prlimit", "--nofile=2048")
    with RayNodes(folder, RAY_AUTH_MODE="disabled") as started:
        started.start_head("head", "--dashboard-host=0.0.0.0", "--dashboard-port=0")
        started.start("good")
        started.start("bad", before=before, PYTHONPATH=str(other))
        yield started


@contextlib.contextmanager
def elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder without our packages: Ray's workers look for modules where their driver runs."""
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield


@pytest.fixture(scope="module")
def findings(nodes: RayNodes, config: Config, folder: Path) -> list[Finding]:
    with elsewhere(folder, pytest.MonkeyPatch()), connected(nodes.address) as url:
        return examine(config, url, lambda done, total, text: None, 120.0)


def checks(findings: list[Finding], node: str) -> dict[str, Check]:
    return {finding.check.name: finding.check for finding in findings if finding.node == node}


def exams() -> list[psutil.Process]:
    """The doctor's actors on this machine."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "NodeExam" in " ".join(process.cmdline()):
                found.append(process)
    return found


@needs_root
@pytest.mark.slow
@pytest.mark.nodes
def test_what_is_wrong_with_a_node_is_found_when_it_looks(findings: list[Finding]):
    bad, good = checks(findings, "bad"), checks(findings, "good")
    failed = {name for name, check in bad.items() if check.status == "fail"}
    assert failed == {"versions", "open files", "run store"}
    assert bad["versions"].got.startswith("roclip ")
    assert source_digest() in bad["versions"].need
    assert bad["open files"].got == "2048"
    assert "Read-only file system" in bad["run store"].got
    assert not {name for name, check in good.items() if check.status == "fail"}
    assert "others' files after" in good["run store"].got


@needs_root
@pytest.mark.slow
@pytest.mark.nodes
def test_nodes_are_compared_when_they_have_looked(findings: list[Finding]):
    assert {f.node for f in findings if f.check.name == "clock" and f.check.status == "ok"} == {"head", "good", "bad"}
    (reduced,) = [finding.check for finding in findings if finding.check.name == "all-reduce"]
    assert "gloo, 3 ranks" in reduced.got
    assert "GB/s; tiny's" in reduced.got
    assert checks(findings, "the cluster")["ranks"].status == "ok"


@needs_root
@pytest.mark.slow
@pytest.mark.nodes
def test_dashboard_that_others_reach_fails_when_it_asks_for_no_token(findings: list[Finding]):
    check = checks(findings, "head")["dashboard"]
    assert check.status == "fail"
    assert "listens on 0.0.0.0, asks for no token" in check.got
    assert "--dashboard-host 127.0.0.1" in check.what_to_do


@needs_root
@pytest.mark.slow
@pytest.mark.nodes
def test_nothing_is_left_when_it_is_done(findings: list[Finding], folder: Path):
    assert findings
    assert list((folder / "runs").iterdir()) == []
    until(lambda: not exams())


@needs_root
@pytest.mark.slow
@pytest.mark.nodes
def test_command_ends_with_7_and_names_the_worst_node_when_checks_fail(nodes: RayNodes, config: Config, folder: Path):
    command = [*COMMAND, config.source, "--cluster", "--address", nodes.address]
    env = environment(RAY_AUTH_MODE="disabled", COLUMNS="300")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "bad: 2048; 2 more" in done.stdout
    assert "open files: Run `ulimit -n 65536`" in done.stdout
    assert "doctor   100%  3 nodes" in done.stdout


@needs_root
@pytest.mark.slow
@pytest.mark.nodes
def test_ctrl_c_leaves_nothing_when_nodes_are_being_asked(nodes: RayNodes, config: Config, folder: Path):
    command = [*COMMAND, config.source, "--cluster", f"--address={nodes.address}"]
    env = environment(RAY_AUTH_MODE="disabled")
    until(lambda: not exams())  # those of the test before may still be there, and the signal would come too early
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: len(exams()) == 3)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    until(lambda: not exams())
    assert list((folder / "runs").iterdir()) == []


@needs_root
@pytest.mark.slow
@pytest.mark.nodes
def test_node_fails_and_the_others_go_on_when_it_is_killed_or_frozen(
    nodes: RayNodes, config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """The last on this cluster: it takes two nodes."""
    frozen: list[psutil.Process] = []

    def on_progress(done: float, total: float, text: str) -> None:
        if text == "stores" and not frozen:
            nodes.kill("good")
            frozen.extend(nodes.tree("bad"))
            for process in frozen:
                process.suspend()

    with elsewhere(folder, monkeypatch), connected(nodes.address) as url:
        try:
            found = examine(config, url, on_progress, 20.0)
        finally:
            for process in frozen:
                process.resume()
    for node in ("good", "bad"):
        check = checks(found, node)["nodes"]
        assert check.status == "fail"
        assert check.got.startswith("stores: ")
        assert "Check that node" in check.what_to_do
    assert checks(found, "head")["nodes"].status == "ok"
    assert checks(found, "head")["run store"].status == "ok"
    assert exit_code(by_check(found)) == 7
    assert list((folder / "runs").iterdir()) == []


@pytest.mark.slow
@pytest.mark.nodes
def test_token_is_asked_for_and_its_file_must_be_private_when_it_is_on(folder: Path, monkeypatch: pytest.MonkeyPatch):
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o644)
    secured = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    (folder / "s").mkdir()
    with RayNodes(folder / "s", **secured) as started:
        started.start_head("head", "--dashboard-host=0.0.0.0", "--dashboard-port=0")
        command = [*COMMAND, "--cluster", f"--address={started.address}", "--verbose"]
        done = subprocess.run(
            command, cwd=folder, env=environment(**secured, COLUMNS="300"), capture_output=True, text=True
        )
        assert done.returncode == 7, done.stderr
        assert "ok    dashboard, head" in done.stdout
        assert f"token, head: Run `chmod 600 {token}`" in done.stdout
        refused = subprocess.run(
            command, cwd=folder, env=environment(RAY_AUTH_MODE="disabled"), capture_output=True, text=True
        )
    assert refused.returncode == 7
    assert "set RAY_AUTH_MODE=token" in refused.stderr


def test_command_says_what_is_needed_when_no_ray_is_named_or_there(tmp_path: Path):
    env = environment(RAY_AUTH_MODE="disabled")
    none = subprocess.run([*COMMAND, "--cluster"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert none.returncode == 2
    assert "--address HOST:6379" in none.stderr
    nobody = subprocess.run(
        [*COMMAND, f"--address=127.0.0.1:{free_port()}"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert nobody.returncode == 7
    assert "refused" in nobody.stderr


def test_clock_fails_when_it_is_wrong_for_sure():
    head = clock_reading(100.0, 100.5, 101.0)
    assert head == ClockReading(0.0, 0.5)
    assert clock_check(head, clock_reading(200.0, 295.0, 200.2)).status == "fail"
    assert "+94,900.0 ms" in clock_check(head, clock_reading(200.0, 295.0, 200.2)).got
    assert clock_check(head, clock_reading(200.0, 202.0, 200.2)).status == "ok"
    assert clock_check(head, clock_reading(200.0, 198.0, 210.0)).status == "ok"  # 7 s late, or answered at once
    assert clock_check(head, clock_reading(200.0, 190.0, 200.2)).status == "fail"


@pytest.mark.parametrize(("asks", "status"), [(True, "ok"), (False, "warn")])
def test_dashboard_on_loopback_is_a_warning_when_it_asks_for_no_token(asks: bool, status: str):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401 if asks else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"127.0.0.1:{server.server_port}"
        bound, found = NodeExam().dashboard(url)
        server.shutdown()
    assert (bound, found) == (["127.0.0.1"], asks)
    assert dashboard_check(url, bound, found).status == status
    assert dashboard_check(url, ["0.0.0.0"], found).status == ("ok" if asks else "fail")


def test_store_is_written_seen_and_cleared_when_it_is_on_s3(monkeypatch: pytest.MonkeyPatch):
    here, there = NodeExam(), NodeExam()
    with s3_server("bucket") as server:
        monkeypatch.setitem(fsspec.config.conf, "s3", server.options)
        try:
            durations = here.write("s3://bucket/shards", "one")
            assert isinstance(durations, dict)
            assert set(durations) == {"write", "read"}
            after_s, missing = there.wait_for_files("s3://bucket/shards", ["one", "two"], 0.2)
            assert missing == ["two"]
            assert after_s >= 0.2
            here.clear("s3://bucket/shards", ["one", "two"])
            assert there.wait_for_files("s3://bucket/shards", ["one"], 0.0)[1] == ["one"]
            assert str(here.write("s3://none/shards", "one")).startswith("s3://none/shards: ")
        finally:
            s3fs.S3FileSystem.clear_instance_cache()


def test_one_row_names_the_worst_nodes_when_nodes_differ():
    fine, short = Check("open files", "ok", "65536", "65536"), Check("open files", "fail", "1024", "65536", "Raise it.")
    row = by_check([Finding(f"n{i}", short if 1 <= i < 6 else fine) for i in range(8)])
    assert row == [Check("open files", "fail", "n1, n2, n3 and 2 more: 1024; 3 more", "65536", "Raise it.")]
    assert by_check([Finding("a", fine), Finding("b", fine)])[0].got == "all 2: 65536"


def test_gpus_fail_when_ray_counts_more_than_there_are():
    import torch

    check = gpu_check(torch.cuda.device_count() + 1)
    assert check.status == "fail"
    assert f"torch sees {torch.cuda.device_count()}" in check.got


@pytest.mark.gpu
@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="needs a GPU")
def test_gpus_are_fit_when_they_multiply_right():
    assert gpu_check(1).status == "ok"


def until(holds, within_s: float = 60.0) -> None:
    end_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.1)
