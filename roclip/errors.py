"""What can go wrong, as a tree; `exit_code` is what the `roclip` command ends with.

    RoclipError            1
    ├── ConfigError        2   a key, a value or a command line is wrong
    ├── DataError          3   URL list, shard or sample
    │   ├── UrlListError
    │   └── ShardError
    ├── CheckpointError    4   altered, incomplete, or of another model
    ├── RunLockedError     5   another process owns the run directory
    ├── TrainingError      6   loss or gradient is not finite, or the ranks disagree
    ├── StageError         7   a stage of the pipeline could not be finished
    └── StoppedError     143   SIGTERM: progress is saved

Ctrl-C ends with 130. `roclip oracle` and `roclip run` end with 0 even for a poisoned checkpoint, unless
`oracle.fail_on` asks otherwise: then 10 (suspicious), 20 (poisoned), 21 (poisoned, repaired and trusted) or 30
(inconclusive).
"""

import errno
from pathlib import Path


class RoclipError(Exception):
    """Base of every error that this project raises on purpose: expected, got, what to do."""

    exit_code = 1


class ConfigError(RoclipError):
    """A configuration key, value or command line is wrong."""

    exit_code = 2


class DataError(RoclipError):
    """Input data cannot be used."""

    exit_code = 3


class UrlListError(DataError):
    """A URL list is missing, empty or lacks a column."""


class ShardError(DataError):
    """A shard is cut short, altered or too broken to learn from."""


class CheckpointError(RoclipError):
    """A checkpoint is incomplete, altered on disk, or belongs to another model."""

    exit_code = 4


class RunLockedError(RoclipError):
    """Another process works in this run directory."""

    exit_code = 5


class TrainingError(RoclipError):
    """Training cannot go on: a value is not finite, or the ranks disagree."""

    exit_code = 6


class StoppedError(RoclipError):
    """SIGTERM asked the training to stop; it has saved its progress."""

    exit_code = 143


class StageError(RoclipError):
    """A stage of the pipeline could not be finished."""

    exit_code = 7


def without_space(error: OSError, where: Path | None = None) -> StageError | None:
    """The error to raise for a full disk; None for any other error."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return StageError(
        f"{error.filename or where or 'a disk'}: no space is left. Make room and run the same command again: it goes on from "
        "what is whole."
    )
