"""The training methods behind one interface, so that the loop reads the same for all of them.

`Clip` trains each image with its own caption. `Roclip` asks the defence for the caption. `Repaired` adds the repair terms to
the loss of either. Letters: B local batch, D feature width, L caption tokens.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from roclip.checkpoint.checkpoint import Stateful
from roclip.config import Config
from roclip.config.schedule import Position
from roclip.data.eda import CaptionEdits
from roclip.data.shards import Manifest
from roclip.data.stream import Batch
from roclip.defence.defence import Defence, Kind, Targets
from roclip.defence.sample_filter import write_suspects
from roclip.model.towers import Towers
from roclip.training import accumulate
from roclip.training.accumulate import Backward
from roclip.training.inputs import poison_aims
from roclip.training.repair_losses import RepairLosses, wants_repair


class Step(Protocol):
    """One optimizer step of a method, on one rank."""

    @property
    def kind(self) -> Kind:
        """`plain`, or what else decides the scale of the loss: `neighbour`, `matched`."""
        ...

    @property
    def tokens(self) -> Tensor:
        """(B, L): the captions that the text tower encodes."""
        ...

    def targets(self, image_features: Tensor, text_features: Tensor, valid: Tensor) -> Targets:
        """The text side of the loss, given the features (B, D) of the forward pass and the valid pairs (B,) bool."""
        ...

    def remember(self, image_features: Tensor, text_features: Tensor, targets: Targets) -> None:
        """Update the method's state after the optimizer step; not called for a step that is left out."""
        ...


class Method(Protocol):
    """What an arm does in a training step."""

    parts: Mapping[str, Stateful]
    """State for the checkpoint, by file name."""
    second_edit: CaptionEdits | None
    """Makes the second view of the captions (`Batch.edited`), where the method needs one."""

    def step(self, batch: Batch, at: Position, prefill: Callable[[], Iterable[Batch]]) -> Step:
        """Begin the step at `at`; `prefill` gives batches for state that must not be empty."""
        ...

    def forward(
        self, engine: Any, pixels: Tensor, step: Step, batch: Batch, at: Position
    ) -> tuple[tuple[Tensor, ...], Backward]:
        """`(image_features, text_features, logit_scale[, logit_bias])` and `backward(loss)`; see `accumulate.forward`."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Metrics of the method's state, for the logged row."""
        ...

    def finish(self, folder: Path, manifest: Manifest) -> None:
        """Write what the method found out to the training's folder, on rank 0, after the last step."""
        ...


def method_of(config: Config, arm: str, towers: Towers, device: torch.device, run: Path) -> Method:
    """The method of an arm, `clip` or `roclip`, with the repair terms that the config asks for."""
    method = Roclip(config, towers, device, run) if arm == "roclip" else Clip(config)
    return Repaired(method, config, towers, device) if wants_repair(config) else method


@dataclass(frozen=True)
class PlainStep:
    """A step in which each image is trained with its own caption."""

    tokens: Tensor
    kind: Kind = "plain"

    def targets(self, image_features: Tensor, text_features: Tensor, valid: Tensor) -> Targets:
        return Targets(text_features, valid)

    def remember(self, image_features: Tensor, text_features: Tensor, targets: Targets) -> None:
        pass


class Clip:
    """Undefended CLIP."""

    second_edit: CaptionEdits | None = None

    def __init__(self, config: Config):
        self.pieces = config.train.grad_accum_steps
        self.parts: Mapping[str, Stateful] = {}

    def step(self, batch: Batch, at: Position, prefill: Callable[[], Iterable[Batch]]) -> Step:
        return PlainStep(batch.tokens)

    def forward(
        self, engine: Any, pixels: Tensor, step: Step, batch: Batch, at: Position
    ) -> tuple[tuple[Tensor, ...], Backward]:
        tokens = step.tokens.to(pixels.device)
        return accumulate.forward(engine, pixels, tokens, pieces=self.pieces, text_gradient=step.kind != "matched")

    def metrics(self) -> Mapping[str, float]:
        return {}

    def finish(self, folder: Path, manifest: Manifest) -> None:
        pass


class Roclip(Clip):
    """CLIP defended by RoCLIP (`roclip.defence`)."""

    def __init__(self, config: Config, towers: Towers, device: torch.device, run: Path):
        super().__init__(config)
        self.defence = Defence(config, towers, device, poison_aims(run))
        self.parts = self.defence.parts

    def step(self, batch: Batch, at: Position, prefill: Callable[[], Iterable[Batch]]) -> Step:
        if self.defence.wants_prefill(at):
            self.defence.prefill(prefill())
        return self.defence.step(batch, at)

    def metrics(self) -> Mapping[str, float]:
        return {"pool_count": self.defence.pool.count}

    def finish(self, folder: Path, manifest: Manifest) -> None:
        """Write `suspects.parquet`."""
        write_suspects(folder / "suspects.parquet", self.defence.sample_filter.scores, manifest)


class Repaired:
    """Another method with the repair terms added to its loss (`roclip.training.repair_losses`)."""

    def __init__(self, method: Method, config: Config, towers: Towers, device: torch.device):
        self.losses = RepairLosses(config, towers.image_size, device)
        self.pieces, self.second_edit = config.train.grad_accum_steps, self.losses.edit
        self.parts, self.step, self.metrics, self.finish = method.parts, method.step, method.metrics, method.finish

    def forward(
        self, engine: Any, pixels: Tensor, step: Step, batch: Batch, at: Position
    ) -> tuple[tuple[Tensor, ...], Backward]:
        return self.losses.forward(
            engine,
            pixels,
            step.tokens.to(pixels.device),
            batch=batch,
            epoch=at.epoch,
            pieces=self.pieces,
            text_gradient=step.kind != "matched",
        )
