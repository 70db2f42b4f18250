"""SIGTERM as a wish: the training loop sees it, saves and leaves, instead of being torn from its step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Leaving:
    """Within it SIGTERM only sets `asked`. Another thread than the main one cannot hear signals, and changes nothing."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> "Leaving":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
