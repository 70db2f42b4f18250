"""Loggers that mirror `metrics.jsonl`: TensorBoard, Weights & Biases. The file stays the truth."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol


class Logger(Protocol):
    """Shows logged steps."""

    def write(self, row: dict) -> None: ...

    def close(self) -> None: ...


def loggers(names: Sequence[str], folder: Path, resume_step: int, closing: ExitStack) -> list[Logger]:
    """Open the loggers that a config names for a training in `<run>/<arm>`, from the step after `resume_step`; `closing`
    closes them."""
    opened = [_KNOWN[name](folder, resume_step) for name in names]
    for logger in opened:
        closing.callback(logger.close)
    return opened


def numbers(row: dict) -> Iterator[tuple[str, float]]:
    """The numbers of a logged step as (name, value): the largest of a list, each value of an object under `name/key`."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", float(each)) for key, each in value.items())
        elif isinstance(value, list | tuple):
            yield name, float(max(value))
        elif isinstance(value, int | float):
            yield name, float(value)


class TensorBoard:
    """Event files in `<run>/<arm>/tensorboard`; after a resume the removed steps are hidden."""

    def __init__(self, folder: Path, resume_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, row: dict) -> None:
        for name, value in numbers(row):
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run named after the folder, also after a resume. Project, entity and mode come from the library's environment
    variables (`WANDB_PROJECT`, `WANDB_MODE=offline`, …)."""

    def __init__(self, folder: Path, resume_step: int):
        import wandb  # seconds to import

        name = f"{folder.parent.name}-{folder.name}"
        self._run = wandb.init(id=name, name=name, dir=str(folder), resume="allow")
        self._run.define_metric("*", step_metric="step")  # a resume logs steps again

    def write(self, row: dict) -> None:
        self._run.log(dict(numbers(row)))

    def close(self) -> None:
        self._run.finish()


_KNOWN = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
