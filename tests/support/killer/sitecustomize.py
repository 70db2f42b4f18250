"""In a process that has this folder in PYTHONPATH, a certain sequence of bytes that arrives on a socket is a segfault."""

import os
import signal
import socket

DEADLY = b"deadly-for-the-decoder"
_recv_into = socket.socket.recv_into
_recv = socket.socket.recv


def _look(content: bytes) -> None:
    if DEADLY in content:
        os.kill(os.getpid(), signal.SIGSEGV)


def recv_into(self, buffer, *rest):
    size = _recv_into(self, buffer, *rest)
    _look(bytes(memoryview(buffer)[:size]))
    return size


def recv(self, *rest):
    content = _recv(self, *rest)
    _look(content)
    return content


socket.socket.recv_into = recv_into
socket.socket.recv = recv
