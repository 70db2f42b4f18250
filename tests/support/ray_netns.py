"""A Ray cluster whose nodes are hosts of their own (`netns.py`): dashboard and token on, as `ray start` brings them up."""

import contextlib
import json
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
from kit import environment
from netns import Host, Network, network, short_folder

PORT = 6379
STORE_BYTES = 80 * 2**20
LOOKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 5,
    "worker_niceness": 0,
}
"""How the head looks after its nodes: one that does not answer is dead after about fifteen seconds (Ray's own settings: 65).
And its workers are as quick as what else runs on this machine, instead of coming after all of it."""


class RayNodes:
    """A head, on which the drivers run, and nodes by name."""

    def __init__(self, net: Network, head_cpus: int):
        self.net = net
        self.folder = short_folder(net.prefix)
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environment = environment(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            RAY_USAGE_STATS_ENABLED="0",
            OMP_NUM_THREADS="1",
        )
        """Of the head and its drivers, and of nodes that are added later."""
        self._started: dict[str, subprocess.Popen] = {}
        self.head = net.add("head")
        self.address = f"{self.head.address}:{PORT}"
        self._start(
            "head",
            "--head", f"--port={PORT}", f"--num-cpus={head_cpus}", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--system-config={json.dumps(LOOKS)}",
        )  # fmt: skip

    def add_node(self, name: str, cpus: int = 1, **resources: float) -> Host:
        """A node that has joined."""
        host = self.net.hosts.get(name) or self.net.add(name)
        self._start(name, f"--address={self.address}", f"--num-cpus={cpus}", f"--resources={json.dumps(resources)}")
        return host

    def kill_node(self, name: str) -> None:
        """SIGKILL for all its processes. `add_node` brings it up again."""
        self.net.hosts[name].kill()
        if started := self._started.pop(name, None):
            started.wait()

    @contextlib.contextmanager
    def drive(self, *command: object, **extra: str) -> Iterator[subprocess.Popen]:
        """A process on the head, with the token; it and its children are gone in the end."""
        with subprocess.Popen(
            self.head.command(*command),
            env={**self.environment, **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for left in [*psutil.Process(process.pid).children(recursive=True), process]:
                        left.kill()

    def roclip(self, *words: object, **extra: str) -> contextlib.AbstractContextManager[subprocess.Popen]:
        """The command `roclip` on the head, with this cluster's address."""
        return self.drive(sys.executable, "-m", "cluster.cli", *words, f"cluster.address={self.address}", **extra)

    def processes_of(self, name: str, title: str) -> list[psutil.Process]:
        """Ray workers of a node whose title begins so."""
        found = []
        for process in map(psutil.Process, self.net.hosts[name].processes()):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found

    def close(self) -> None:
        for name in list(self._started):
            self.kill_node(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, *options: str) -> None:
        host, said = self.net.hosts[name], self.folder / f"{name}.txt"
        command = host.command(
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            f"--node-ip-address={host.address}", f"--temp-dir={self.folder / name}",
            f"--object-store-memory={STORE_BYTES}", *options,
        )  # fmt: skip
        with said.open("w") as out:
            process = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._started[name] = process
        deadline_s = time.monotonic() + 300
        while "Ray runtime started" not in said.read_text():
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline_s, said.read_text()
            time.sleep(0.1)


@contextlib.contextmanager
def ray_nodes(head_cpus: int = 1) -> Iterator[RayNodes]:
    """A head with nothing beside it yet. All of it is gone in the end."""
    with network() as net:
        nodes = RayNodes(net, head_cpus)
        try:
            yield nodes
        finally:
            nodes.close()
