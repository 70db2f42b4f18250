"""Graceful SIGTERM: the training loop notices the signal, saves and ends, instead of being killed in the middle of a step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_heard = threading.Event()
_left = threading.Event()
_left.set()


class GracefulSigterm:
    """Within the context SIGTERM only sets `asked`. Signal handlers can be set in the main thread only: in any other thread the
    signal is noticed if the main thread has called `listen`."""

    def __init__(self) -> None:
        self._before: Any = None

    @property
    def asked(self) -> bool:
        return _heard.is_set()

    def __enter__(self) -> "GracefulSigterm":
        _left.clear()
        if threading.current_thread() is threading.main_thread():
            _heard.clear()
            self._before = listen()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        _left.set()


def listen() -> Any:
    """Install a handler that only records SIGTERM; returns the previous handler. Call it in the main thread."""
    return signal.signal(signal.SIGTERM, _note)


def leave(timeout_s: float) -> bool:
    """Ask the training in another thread of this process to save and end, as SIGTERM would. Returns whether it has ended within
    `timeout_s`; true at once if none is running."""
    _heard.set()
    return _left.wait(timeout_s)


def _note(number: int, frame: FrameType | None) -> None:
    _heard.set()
