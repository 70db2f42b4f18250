"""Runs sent to a real Ray head: submit, follow through a cut line, stop, go on, and a driver that is killed."""

import contextlib
import json
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from cut_line import cut_line
from ends import KILLED_RUN, STEPS, assert_same_end, logged, until
from kit import preset, tiny_shards
from ray_head import Head, ray_head

from roclip.metrics.registry import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.ray]
LOGGED = re.compile(r"step (\d+)")
LONG, STEPS_PER_EPOCH = 20, STEPS // 4
"""Epochs of a run that is to be stopped by commands, each of which takes seconds to start."""


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with ray_head(tmp_path_factory.mktemp("head")) as head:
        yield head


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    return preset(folder, KILLED_RUN.format(shards=tiny_shards(folder / "shards")) + f"runs: {folder}/runs\n")


def start(head: Head, *arguments: str, **extra: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env={**head.environment, **extra}, **pipes, text=True, start_new_session=True)


def roclip(head: Head, *arguments: str, code: int = 0, **extra: str) -> str:
    with start(head, *arguments, "--address", head.dashboard, **extra) as process:
        said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    return said


@contextlib.contextmanager
def stalled(head: Head) -> Iterator[None]:
    """Its ranks take no step meanwhile, so that some are left however fast the machine is."""
    ranks = [process for process in head.processes() if "RayTrainWorker" in " ".join(process.cmdline())]
    assert ranks
    for rank in ranks:
        rank.suspend()
    try:
        yield
    finally:
        for rank in ranks:
            rank.resume()


@pytest.fixture(scope="module")
def sent(head, config):
    """A run that was sent through a line which is cut while it trains: its directory, and what the client said."""
    with cut_line(urlsplit(head.dashboard).port) as line:
        address = f"http://127.0.0.1:{line.port}"
        begun_s = time.monotonic()
        lines = []
        with start(head, "submit", str(config), "--run-id", "one", "--address", address) as process:
            for text in process.stdout:
                lines.append(text)
                if text.startswith("start "):
                    print(f"submit to first log line: {time.monotonic() - begun_s:.1f} s")  # seen with -s
                if " from step 0" in text:
                    line.cut()
                if " is lost " in text:
                    line.mend()
    run = config.parent / "runs" / "one"
    assert process.returncode == 0, "".join(lines)
    return run, lines


def test_submit_shows_each_line_once_through_a_lost_connection(head, sent):
    _, lines = sent
    assert any(" is lost (" in line for line in lines)
    said = [line for line in lines if not line.startswith("the connection")]
    assert said[0].startswith("job      one.1 sent to")
    assert said[-1] == "job      one.1: succeeded\n"
    log = roclip(head, "logs", "one").splitlines(keepends=True)
    assert said[1:-1] == log
    steps = [int(LOGGED.search(line)[1]) for line in log if "loss" in line]
    assert steps == sorted(set(steps))


def test_run_directory_is_the_owners_and_can_be_used_without_the_preset(sent):
    run, _ = sent
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert (run / "models" / "tiny.json").is_file()
    assert json.loads((run / "summary.json").read_text())["config"] == "preset.yaml"


def test_status_and_runs_tell_the_story(head, sent):
    run, _ = sent
    said = roclip(head, "status", "one")
    assert "one.1" in said
    assert "succeeded" in said
    assert str(run) in said
    assert "100%" in said
    assert re.search(r"roclip +100%  \d+ epochs, \d+ steps", said)  # a stage of the run directory
    assert re.search(r"one\.1 +preset\.yaml +succeeded", roclip(head, "runs"))


def test_token_is_in_no_log_metadata_or_process_list(head, sent):
    run, lines = sent
    token = head.token
    assert len(token) == 64
    jobs = requests.get(f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=30)
    assert jobs.ok
    assert jobs.json()[0]["metadata"]["run_dir"] == str(run)
    assert token not in jobs.text
    assert token not in "".join(lines)
    for process in head.processes():
        assert token not in " ".join(process.cmdline())
    session = next(Path(word.split("=")[1]) for word in psutil.Process(head.pid).cmdline() if "--temp-dir" in word)
    files = [path for folder in (run, session) for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if token.encode() in path.read_bytes()] == []


def test_commands_without_or_with_another_token_are_refused(head, config, tmp_path):
    (tmp_path / "other").write_text("f" * 64)
    for file, got in ((tmp_path / "other", "another"), (tmp_path / "none", "none")):
        said = roclip(head, "submit", str(config), code=2, RAY_AUTH_TOKEN_PATH=str(file))
        assert f"expected the cluster's token, got {got}" in " ".join(said.split())
        assert "ffff" not in said


def test_nothing_is_sent_when_the_config_is_wrong(head, config):
    assert "unknown key 'poool'" in roclip(head, "submit", str(config), "poool.size=4", code=2)
    assert "wrong" not in roclip(head, "runs")


def test_exit_code_is_that_of_the_run(head, config, tmp_path):
    said = roclip(head, "submit", str(config), f"data.shards={tmp_path}/{{0..3}}.tar", "--run-id", "empty", code=3)
    assert "empty.1: failed, exit code 3" in said


def test_ctrl_c_only_detaches_and_stop_ends_cleanly(head, config):
    """The same command attaches to the job that lives."""
    run = config.parent / "runs" / "two"
    command = ("submit", str(config), f"train.epochs={LONG}", "--run-id", "two", "--address", head.dashboard)
    with start(head, *command) as first:
        until(lambda: logged(run) >= 3, lambda: "" if first.poll() is None else first.communicate()[0])
        with stalled(head):
            first.send_signal(signal.SIGINT)
            said, _ = first.communicate(timeout=120)
            again = roclip(head, *command[:-2], "--detach")
    assert first.returncode == 130
    assert "detached; the job goes on" in said
    assert "roclip stop two.1" in said
    assert "two.1 is there already" in again
    assert "two.1: stopped" in roclip(head, "stop", "two")
    assert logged(run) < LONG * STEPS_PER_EPOCH
    assert "stopped by Ctrl-C" in roclip(head, "logs", "two")


def test_stopped_run_goes_on_and_once_more_after_its_driver_was_killed(head, config):
    """Runs after the test above, which stops it."""
    run, epochs = config.parent / "runs" / "two", f"train.epochs={LONG}"
    stopped = logged(run)
    with start(head, "run", str(config), epochs, f"run_dir={run}", "--address", head.gcs) as driver:
        until(lambda: logged(run) > stopped, lambda: "" if driver.poll() is None else driver.communicate()[0])
        driver.kill()
    killed = logged(run)
    assert killed < LONG * STEPS_PER_EPOCH
    said = roclip(head, "submit", str(config), epochs, "--run-id", "two")
    assert "two.2 sent to" in said
    assert 0 < int(re.findall(r"ranks from step (\d+)", said)[-1]) <= killed
    steps = [row["step"] for row in read_metrics(run / "roclip" / "metrics.jsonl")]
    assert steps == list(range(1, LONG * STEPS_PER_EPOCH + 1))


def test_run_without_ray_ends_the_same(sent, undisturbed):
    whole, _ = sent
    assert_same_end(undisturbed(1), whole)
