"""Ray nodes on this machine, each a `ray start --block` with an environment, limits and mounts of its own."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import ray
from kit import environment, free_port

_START_S = 120.0


class RayNodes:
    """A head and more nodes by name; all their processes end with the block.

    Args:
        folder: For Ray's session and the nodes' logs; a short path, for there are sockets in it.
        env: Of every node and of `address`'s clients.
    """

    def __init__(self, folder: Path, **env: str):
        self.folder, self.env = folder, environment(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", **env)
        self.address = ""
        self._processes: dict[str, subprocess.Popen] = {}

    def start_head(self, name: str, *flags: str) -> None:
        """Start the head and wait until it takes nodes."""
        port = free_port()
        self._start(name, ["--head", "--port", port, "--temp-dir", str(self.folder / "ray"), *flags])
        self._wait(name)
        self.address = f"{ray.util.get_node_ip_address()}:{port}"

    def start(self, name: str, *flags: str, before: tuple[str, ...] = (), **env: str) -> None:
        """Start a node and wait until the head knows it.

        Args:
            before: A command that runs the rest of its line, such as `prlimit --nofile=100`.
        """
        self._start(name, ["--address", self.address, *flags], before, env)
        self._wait(name)

    def kill(self, name: str) -> None:
        """SIGKILL to all processes of a node."""
        process = self._processes.pop(name)
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for each in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(tree, timeout=10)
        process.wait()

    def __enter__(self) -> "RayNodes":
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self._processes)):
            self.kill(name)

    def _start(self, name: str, flags: list[str], before: tuple[str, ...] = (), env: dict[str, str] | None = None) -> None:
        command = [
            *before,
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            f"--node-name={name}",
            "--num-cpus=1",
            "--object-store-memory=80000000",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--dashboard-agent-listen-port={free_port()}",
            *flags,
        ]
        with (self.folder / f"{name}.log").open("w") as log:
            self._processes[name] = subprocess.Popen(
                command, env={**self.env, **(env or {})}, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )

    def _wait(self, name: str) -> None:
        until_s = time.monotonic() + _START_S
        log = self.folder / f"{name}.log"
        while "Ray runtime started" not in log.read_text():
            if self._processes[name].poll() is not None or time.monotonic() > until_s:
                raise TimeoutError(f"{name} did not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)

