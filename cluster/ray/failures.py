"""How a Ray task failed."""

from typing import Literal

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

Failure = Literal["lost", "memory", "died", "failed"]
"""lost: its node or its input went away, which says nothing about the task. memory: Ray ended the worker because the
node's memory was short. died: the worker's process ended. failed: the task raised an error."""


def kind_of(error: RayError) -> Failure:
    """The failure that an error of `ray.get` stands for."""
    if isinstance(error, NodeDiedError | ObjectLostError | TaskCancelledError):
        return "lost"
    if isinstance(error, OutOfMemoryError):
        return "memory"
    return "died" if isinstance(error, WorkerCrashedError) else "failed"


def cause_of(error: RayError) -> BaseException:
    """The error that the task raised, or else Ray's own."""
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) else error


def words_of(error: RayError) -> str:
    """The failure in one line."""
    cause = cause_of(error)
    return f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'no message'}"
