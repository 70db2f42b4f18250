"""Ray nodes on this machine, each a `ray start --block` with an environment, limits and mounts of its own."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import ray
from kit import environment, free_port

_START_S, _TRIES = 90.0, 4
_PORTS = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")


class RayNodes:
    """A head and more nodes by name; all their processes end with the block.

    Args:
        folder: For Ray's session and the nodes' logs; a short path, for there are sockets in it.
        env: Of every node.
    """

    def __init__(self, folder: Path, **env: str):
        self.folder, self.address = folder, ""
        self.env = environment(RAY_USAGE_STATS_ENABLED="0", **env)
        self._processes: dict[str, subprocess.Popen] = {}

    def start_head(self, name: str, *flags: str) -> None:
        """Start the head and wait until it takes nodes."""
        port = free_port()
        self._start(name, ["--head", f"--port={port}", f"--temp-dir={self.folder / 'ray'}", *flags], (), {})
        self.address = f"{ray.util.get_node_ip_address()}:{port}"

    def start(self, name: str, *, before: tuple[str, ...] = (), **env: str) -> None:
        """Start a node and wait until the head knows it.

        Args:
            before: A command that runs the rest of its line, such as `prlimit --nofile=100`.
        """
        self._start(name, [f"--address={self.address}"], before, env)

    def tree(self, name: str) -> list[psutil.Process]:
        """All processes of a node."""
        root = psutil.Process(self._processes[name].pid)
        return [root, *root.children(recursive=True)]

    def kill(self, name: str) -> None:
        """SIGKILL to all processes of a node."""
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = self.tree(name)
            for each in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(tree, timeout=10)
        self._processes.pop(name).wait()

    def __enter__(self) -> "RayNodes":
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self._processes)):
            self.kill(name)

    def _start(self, name: str, flags: list[str], before: tuple[str, ...], env: dict[str, str]) -> None:
        """Try again where it fails: Ray gives a node's agent 15 s to start, which can be short on a busy machine."""
        log = self.folder / f"{name}.log"
        for _ in range(_TRIES):
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
                *(f"--{port}-port={free_port()}" for port in _PORTS),
                *flags,
            ]
            with log.open("w") as out:
                self._processes[name] = subprocess.Popen(
                    command, env={**self.env, **env}, cwd=self.folder, stdout=out, stderr=out, start_new_session=True
                )
            if self._has_started(name, log):
                return
            self.kill(name)
        raise TimeoutError(f"{name} did not start: {log.read_text()[-2000:]}")

    def _has_started(self, name: str, log: Path) -> bool:
        until_s = time.monotonic() + _START_S
        while self._processes[name].poll() is None and time.monotonic() < until_s:
            if "Ray runtime started" in log.read_text():
                return True
            time.sleep(0.1)
        return False
