"""A Ray with a token on ports of its own, a Prometheus that scrapes it, and what a tiny run on it leaves there."""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from debian import program
from kit import REPOSITORY, environment, free_port

PROMETHEUS_DIR = REPOSITORY / "configs" / "cluster" / "prometheus"
REPORT_S = 1.0
"""How often Ray's processes report; gauges of a process that has ended are dropped after two of these."""

WATCHED_RUN = """
name: watched
run_dir: {folder}/runs/watched
arms: [roclip]
data: {{scenes: 200, min_shards: 1}}
attacks: {{targeted: {{images: 4, captions_per_image: 3}}, backdoors: [{{kind: patch, count: 10}}]}}
ingest: {{samples_per_shard: 128, image_size: 64, encode_format: png, encode_quality: 6, retry_passes: 0,
  policy: {{allow_networks: [127.0.0.0/8], robots: false, host_connections: 256, host_requests_per_s: 1.0e6,
    max_redirects: 0}}}}
model: {{name: tiny}}
pool: {{size: 64, neighbours: 8, warmup: 1, filter_frac: [0.1, 0.1], match_every: 2}}
train: {{epochs: 4, global_batch_size: 64, lr: 1e-3, log_every_steps: 1, checkpoint_every_steps: 4,
  checkpoint_store: "memory://store"}}
evaluate: {{size: 20, every: 0}}
oracle: {{trusted: 200, epochs: 1}}
cluster: {{address: "{address}"}}
"""


def waited(
    found: Callable[[], Any], what: str, last_words: Callable[[], str] = lambda: "", within_s: float = 240
) -> Any:
    """What `found` gives, once that is something."""
    deadline_s = time.monotonic() + within_s
    while not (value := found()):
        assert time.monotonic() < deadline_s, f"{what}: never. {last_words()}"
        time.sleep(0.1)
    return value


@dataclass(frozen=True)
class Head:
    """A Ray head node on loopback."""

    address: str
    dashboard: str
    token: str
    folder: Path
    process: subprocess.Popen

    @property
    def environment(self) -> dict[str, str]:
        """Of processes that work on it."""
        return _with(self.token)

    @property
    def discovery(self) -> Path:
        """Where Ray lists its nodes for Prometheus."""
        return self.folder / "prom_metrics_service_discovery.json"

    def get(self, path: str) -> Any:
        """JSON of the dashboard's API."""
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    def metrics(self) -> str:
        """What a node shows Prometheus."""
        if not self.discovery.exists():
            return ""
        text = ""
        for group in json.loads(self.discovery.read_text()):
            for target in group["targets"]:
                with contextlib.suppress(OSError):
                    text += urllib.request.urlopen(f"http://{target}/metrics", timeout=10).read().decode()
        return text

    def roclip(self, *arguments: str) -> subprocess.Popen:
        """A command of ours that works on this Ray."""
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
        )

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of this Ray whose title begins so."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(name):
                    found.append(process)
        return found


@contextlib.contextmanager
def ray_head(cpus: int = 3) -> Iterator[Head]:
    """Started by `ray start`, ended with all its processes. A start that Ray gives up, for a busy machine, is tried again."""
    head = _started(cpus)
    try:
        yield head
    finally:
        _end(head)


def _started(cpus: int) -> Head:
    for _ in range(5):
        head = _start_head(cpus)
        if waited(partial(_state, head), "Ray", partial(_said, head)) == "up":
            return head
        said = _said(head)
        _end(head)
        assert "timed out during startup" in said, said
    pytest.fail("Ray does not start on this machine")


def _start_head(cpus: int) -> Head:
    folder = Path(tempfile.mkdtemp(prefix="rc"))  # short: a socket's path has at most 107 bytes
    port, dashboard = free_port(), free_port()
    options = {
        "port": port,
        "dashboard-port": dashboard,
        "dashboard-host": "127.0.0.1",
        "node-ip-address": "127.0.0.1",
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": free_port(),
        "dashboard-agent-grpc-port": free_port(),
        "runtime-env-agent-port": free_port(),
        "metrics-export-port": free_port(),
        "num-cpus": cpus,
        "object-store-memory": 100 * 2**20,
        "temp-dir": folder,
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    token = secrets.token_hex(32)
    ports = {f"{part}_METRIC_PORT": free_port() for part in ("AUTOSCALER", "DASHBOARD")}
    with (folder / "said.txt").open("w") as out:
        process = subprocess.Popen(command, env=_with(token) | ports, stdout=out, stderr=out, start_new_session=True)
    return Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", token, folder, process)


def _with(token: str) -> dict[str, str]:
    return environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=token,
        RAY_TRAIN_ENABLE_STATE_TRACKING="1",
        RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="1",
        RAY_metrics_report_interval_ms=str(int(1000 * REPORT_S)),
        OMP_NUM_THREADS="1",
    )


def _state(head: Head) -> str:
    if head.process.poll() is not None:
        return "ended"
    with contextlib.suppress(OSError):
        nodes = head.get("/api/v0/nodes")["data"]["result"]["result"]
        if any(node["state"] == "ALIVE" for node in nodes) and head.discovery.exists():
            return "up"
    return ""


def _said(head: Head) -> str:
    return (head.folder / "said.txt").read_text()


def _end(head: Head) -> None:
    family = [process for process in psutil.process_iter() if _session(process) == head.process.pid]
    head.process.terminate()
    psutil.wait_procs(family, timeout=10)
    for left in family:
        with contextlib.suppress(psutil.Error):
            left.kill()
    head.process.kill()
    head.process.wait()
    shutil.rmtree(head.folder, ignore_errors=True)


def _session(process: psutil.Process) -> int:
    with contextlib.suppress(OSError):
        return os.getsid(process.pid)
    return -1


class Prometheus:
    """The real one, with our rules, on loopback."""

    def __init__(self, discovery: Path, folder: Path, every: str = "1s"):
        self.address = f"127.0.0.1:{free_port()}"
        config = yaml.safe_load((PROMETHEUS_DIR / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": every, "evaluation_interval": every}
        config["rule_files"] = [str(PROMETHEUS_DIR / "alerts.yml")]
        (scrape,) = config["scrape_configs"]
        scrape["file_sd_configs"] = [{"files": [str(discovery)], "refresh_interval": "1s"}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.log = folder / "prometheus.log"
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [
                    program("prometheus", "prometheus"),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address={self.address}",
                ],
                stdout=out,
                stderr=out,
            )

    def __enter__(self) -> "Prometheus":
        try:
            waited(self._ready, "Prometheus", self.log.read_text)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5).status == 200
        return False

    def _get(self, path: str, **query: str) -> Any:
        try:
            with urllib.request.urlopen(
                f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=30
            ) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error

    def range(self, expr: str, start_s: float, end_s: float) -> list[dict]:
        """The series of a query over a time, with all their values."""
        step = str(max(1, round((end_s - start_s) / 1000)))
        return self._get("query_range", query=expr, start=str(start_s), end=str(end_s), step=step)["result"]

    def rules(self) -> list[dict]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[dict]:
        return self._get("targets")["activeTargets"]


def promtool(*arguments: str, stdin: str | None = None) -> str:
    """What it says; an error if it finds one."""
    done = subprocess.run(
        [program("promtool", "prometheus"), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def names_in(text: str) -> set[str]:
    """The metrics of Ray, and ours through it, in an expression."""
    return set(re.findall(r"\bray_\w+", text))
