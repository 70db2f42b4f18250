"""The head of a Ray cluster in processes of its own, with its dashboard and a token, as `ray start` makes it."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from kit import environment, free_port


@dataclass(frozen=True)
class Head:
    """A running head."""

    dashboard: str
    gcs: str
    """What a driver on this machine takes as `cluster.address`."""
    token_file: Path
    pid: int

    @property
    def token(self) -> str:
        return self.token_file.read_text()

    @property
    def environment(self) -> dict[str, str]:
        """Of a client or driver that has the token."""
        return environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(self.token_file))

    def processes(self) -> list[psutil.Process]:
        """All of the cluster's."""
        head = psutil.Process(self.pid)
        return [head, *head.children(recursive=True)]


@contextlib.contextmanager
def ray_head(folder: Path, *, cpus: int = 3, token: bool = True) -> Iterator[Head]:
    """A head on ports of its own; nothing of it is left in the end. Without `token`, its dashboard lets everybody in."""
    token_file = folder / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    gcs, dashboard = free_port(), free_port()
    with tempfile.TemporaryDirectory(
        prefix="r", dir="/tmp", ignore_cleanup_errors=True
    ) as short:  # sockets' names are long
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--num-cpus={cpus}", f"--temp-dir={short}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--ray-client-server-port=" + free_port()),
            *("--dashboard-agent-listen-port=" + free_port(), "--metrics-export-port=" + free_port()),
            "--object-store-memory=100000000",
        ]
        patience = {"RAY_agent_register_timeout_ms": "240000", "RAY_raylet_start_wait_time_s": "300"}  # a busy machine
        mode = {**patience, "RAY_AUTH_MODE": "token" if token else "disabled", "RAY_AUTH_TOKEN_PATH": str(token_file)}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        url, log = f"http://127.0.0.1:{dashboard}", folder / "head.log"
        for _ in range(3):  # a node gives itself 30 s to come up, which a busy machine may not have
            with _started(command, environment(**mode, PATH=path), log) as process:
                if _is_up(url, process, log):
                    yield Head(url, f"127.0.0.1:{gcs}", token_file, process.pid)
                    return
    raise AssertionError(log.read_text())


@contextlib.contextmanager
def _started(command: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    mark = next(word for word in command if word.startswith("--temp-dir=")).partition("=")[2]
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        left = [one for one in psutil.process_iter(["cmdline"]) if mark in " ".join(one.info["cmdline"] or ())]
        for one in left:  # only this head's have its folder in their command line
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(left, timeout=30)


def _is_up(url: str, process: subprocess.Popen, log: Path) -> bool:
    """Wait until the node is there and its dashboard answers; False when it has ended instead."""
    while process.poll() is None:
        if "Ray runtime started" in log.read_text():
            try:
                with urllib.request.urlopen(f"{url}/api/version", timeout=30):
                    return True
            except urllib.error.HTTPError:  # 401: it wants the token
                return True
            except OSError:
                pass
        time.sleep(0.2)
    return False
