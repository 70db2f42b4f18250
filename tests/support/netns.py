"""Hosts on one machine: network namespaces with addresses of their own, joined by a bridge, whose links can be cut or made slow.

The bridge lies in a namespace of its own, so nothing of it is seen from outside, and it goes with that namespace. Names begin
with `rx<pid>-`: what a killed test left behind is swept by the next. Files are shared, as on NFS. Needs root and `ip`.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from debian import program

_WIRE = Path(__file__).with_name("wire.py")
_NAME = re.compile(r"rx(\d+)-\w+")


class Host:
    """One namespace: processes started in it have its address and no other."""

    def __init__(self, namespace: str, address: str, number: int):
        self.namespace, self.address, self.number = namespace, address, number

    def command(self, *command: object) -> list[str]:
        """The command line that runs `command` on this host, under the same process id."""
        return ["ip", "netns", "exec", self.namespace, *map(str, command)]

    def processes(self) -> list[int]:
        """Ids of all processes on it."""
        return [int(word) for word in _ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """SIGKILL for every process on it, at once, as when its power goes."""
        deadline_s = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline_s:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)


class Network:
    """Hosts by name on one bridge."""

    def __init__(self) -> None:
        self.prefix = f"rx{os.getpid()}-"
        self.hosts: dict[str, Host] = {}
        self._wires: dict[str, subprocess.Popen] = {}
        self._subnet = f"10.{random.randint(64, 254)}.{random.randint(0, 254)}"
        self._hub = f"{self.prefix}hub"
        _ip("netns", "add", self._hub)
        self._at_hub("link", "add", "bridge", "type", "bridge")
        self._at_hub("link", "set", "bridge", "up")

    def add(self, name: str) -> Host:
        """A new host with a link to the bridge."""
        number = len(self.hosts) + 1
        host = Host(f"{self.prefix}{name}", f"{self._subnet}.{number}", number)
        _ip("netns", "add", host.namespace)
        self.hosts[name] = host
        port = _port(host)
        self._at_hub("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        self._at_hub("link", "set", port, "master", "bridge", "up")
        _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", host.namespace, "link", "set", device, "up")
        return host

    def cut(self, host: Host) -> None:
        """Nothing passes its link any more, and nobody is told: the host's own end stays up."""
        self._at_hub("link", "set", _port(host), "nomaster")

    def heal(self, host: Host) -> None:
        """The link is as at first."""
        wire = self._wires.pop(host.namespace, None)
        if wire is not None:
            _end(wire)
            self._at_hub("link", "del", _side(host))
        self._at_hub("link", "set", _port(host), "master", "bridge")

    def slow(self, host: Host, delay_s: float, loss_frac: float) -> None:
        """Each frame takes so long, each way, and some are lost. A process carries them: not each kernel has netem."""
        side, outer, inner = _side(host), f"o{host.number}", f"i{host.number}"
        self._at_hub("link", "add", side, "type", "bridge")
        command = ("ip", "netns", "exec", self._hub, sys.executable, _WIRE, outer, inner, delay_s, loss_frac)
        wire = self._wires[host.namespace] = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, text=True
        )
        assert wire.stdout is not None
        assert wire.stdout.readline() == "ready\n"
        self._at_hub("link", "set", outer, "master", "bridge", "up")
        self._at_hub("link", "set", inner, "master", side, "up")
        self._at_hub("link", "set", side, "up")
        self._at_hub("link", "set", _port(host), "master", side)

    def remove(self, name: str) -> None:
        """Kill what runs on a host, and take it away."""
        host = self.hosts.pop(name)
        host.kill()
        _ip("netns", "del", host.namespace)

    def close(self) -> None:
        for wire in self._wires.values():
            _end(wire)
        for name in list(self.hosts):
            self.remove(name)
        _ip("netns", "del", self._hub)

    def _at_hub(self, *words: str) -> None:
        _ip("-n", self._hub, *words)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A network without hosts; it and all that ran on it are gone in the end. Skips the test without root or `ip`."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    program("ip", "iproute2")
    sweep()
    net = Network()
    try:
        yield net
    finally:
        net.close()


def short_folder(prefix: str) -> Path:
    """A new folder whose path is short enough for the Unix sockets in it."""
    return Path(tempfile.mkdtemp(prefix=prefix))


def sweep() -> None:
    """End and delete what tests whose process is gone have left: processes, namespaces, folders."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        if _is_left(name):
            Host(name, "", 0).kill()
            _ip("netns", "del", name)
    for folder in Path(tempfile.gettempdir()).glob("rx*-*"):
        if _is_left(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _is_left(name: str) -> bool:
    found = _NAME.fullmatch(name)
    return found is not None and not psutil.pid_exists(int(found[1]))


def _port(host: Host) -> str:
    return f"p{host.number}"


def _end(wire: subprocess.Popen) -> None:
    wire.kill()
    wire.communicate()


def _side(host: Host) -> str:
    return f"b{host.number}"


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout
