"""A network namespace for each process that runs tests, so that files which start a Ray can run side by side.

Two Rays on one machine would find each other's ports. Needs root.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from functools import cache

_NEW_NETWORK = 0x40000000
_SET_FLAGS = 0x8914
_UP = 0x1
_OF_NOBODY = "198.19.255.1"  # RFC 2544; with loopback alone the resolver finds no address to listen on for Slurm
_libc = ctypes.CDLL(None, use_errno=True)
_outside: list[int] = []


@cache
def is_possible() -> bool:
    """Whether this machine lets us make one."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


def enter() -> None:
    """This thread, and whatever it starts from now on, has loopback and one address, and nothing else."""
    address = _OF_NOBODY
    with contextlib.suppress(OSError):
        of_machine = socket.gethostbyname(socket.gethostname())  # collectives listen on what its name resolves to
        address = _OF_NOBODY if of_machine.startswith("127.") else of_machine
    _outside.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))
    _checked(_libc.unshare(_NEW_NETWORK))
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh", b"lo", _UP))
    subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Within it this thread is back in the network of the machine."""
    inside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        for network in _outside:
            _checked(_libc.setns(network, _NEW_NETWORK))
        yield
    finally:
        _checked(_libc.setns(inside, _NEW_NETWORK))
        os.close(inside)


def _checked(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
