"""SIGTERM as a wish: the training loop sees it, saves and leaves, instead of being torn from its step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_heard = threading.Event()
_left = threading.Event()
_left.set()


class SigtermAsWish:
    """Within it SIGTERM only makes `asked` true. In another thread than the main one, which alone can set a handler,
    it is heard if the main thread has called `listen`."""

    def __init__(self) -> None:
        self._before: Any = None

    @property
    def asked(self) -> bool:
        return _heard.is_set()

    def __enter__(self) -> "SigtermAsWish":
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
    """From now on SIGTERM is only noted. Call it in the main thread; returns the handler that was there."""
    return signal.signal(signal.SIGTERM, _note)


def leave(timeout_s: float) -> bool:
    """Ask the training in another thread of this process to save and leave, as SIGTERM would. Whether it has, in so many
    seconds; true at once where none runs."""
    _heard.set()
    return _left.wait(timeout_s)


def _note(number: int, frame: FrameType | None) -> None:
    _heard.set()
