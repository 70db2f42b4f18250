"""Detects divergence from a step's loss and gradients before the update, and applies `train.on_divergence`.

The values are reduced over the ranks, so every rank decides the same. `diverged.json` beside `metrics.jsonl` records each step
that was left out, with the reason and the shard and key of every sample of its batch.
"""

import json
import logging
from collections import deque
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from roclip import distributed
from roclip.config import TrainConfig
from roclip.errors import TrainingError
from roclip.storage import write_atomic

WINDOW = 64
"""Steps of a kind, the latest, whose median is the reference for a spike."""
LEAST = 16
"""Steps of a kind that must have been seen before spikes are detected."""
_KINDS = ("plain", "neighbour", "matched")
_NAMES = ("loss", "gradient norm")
_ADVICE = (
    "Lower train.lr, set train.grad_clip_norm, use train.precision=fp32, or let such steps be left out with "
    "train.on_divergence=skip or rollback; the same command resumes from the last checkpoint."
)


class Divergence:
    """Checks the steps of one training, and records those that are left out.

        spike: value > spike_factor x median of the values of the last 64 steps of the kind, from the 17th on

    for the loss and for the gradient norm. Each kind of step has its own median, since the losses of a matched and a plain step
    are different quantities. It is part of the checkpoint (`checkpoint.Stateful`), so that a resume decides the same.

    Args:
        path: `diverged.json`.
    """

    def __init__(self, settings: TrainConfig, path: Path):
        self.settings, self.path = settings, path
        known = json.loads(path.read_text()) if distributed.rank() == 0 and path.exists() else []
        self.records: dict[int, dict] = {record["step"]: record for record in distributed.broadcast_object(known)}
        self._recent = {kind: deque[tuple[float, ...]](maxlen=WINDOW) for kind in _KINDS}

    @property
    def left_out(self) -> int:
        """Steps that were left out so far."""
        return sum(record["done"] != "stop" for record in self.records.values())

    def known(self, step: int) -> bool:
        """Whether a rollback went back to leave this step out."""
        return step in self.records and self.records[step]["done"] == "rollback"

    def in_features(self, image_features: Tensor, text_features: Tensor) -> str:
        """The reason why a step's features cannot be used, before the sample filter sees them, or ""."""
        total = distributed.all_sum(image_features.sum() + text_features.sum())
        return "" if torch.isfinite(total) else "features not finite"

    def in_values(self, kind: str, loss: Tensor, gradient_norm: Tensor) -> str:
        """The reason why a step of a kind (`plain`, `neighbour`, `matched`) must be left out, or "". The values of a good step
        enter the medians.

        Args:
            loss: This rank's loss, a scalar.
            gradient_norm: The norm of the mean gradient, the same on all ranks.
        """
        mean_loss = distributed.all_sum(loss) / distributed.world_size()
        values = tuple(torch.stack([mean_loss, gradient_norm.to(mean_loss)]).tolist())
        recent = self._recent[kind]
        for place, (name, value) in enumerate(zip(_NAMES, values, strict=True)):
            if not torch.isfinite(torch.tensor(value)):
                return f"{name} not finite"
            usual = median(seen[place] for seen in recent) if len(recent) >= LEAST else 0.0
            if 0 < self.settings.spike_factor * usual < value:
                return (
                    f"{name} {value:.4g}, more than train.spike_factor = {self.settings.spike_factor} times the median "
                    f"{usual:.4g} of the last {len(recent)} {kind} steps"
                )
        recent.append(values)
        return ""

    def handle(self, step: int, why: str, samples: list[str]) -> bool:
        """Record a step that must not be taken; returns whether to go back to the last checkpoint. Otherwise it is left out.

        Args:
            samples: Shard and key of all samples of the global batch.

        Raises `TrainingError` if `on_divergence` is stop, or if more than `max_left_out` steps were left out.
        """
        policy = self.settings.on_divergence
        self.records[step] = {"step": step, "why": why, "done": policy, "samples": samples}
        if distributed.rank() == 0:
            write_atomic(self.path, json.dumps(list(self.records.values()), indent=1))
        message = (
            f"step {step}: {why}, before the update. Samples: {', '.join(samples[:3])} and {len(samples) - 3} more, "
            f"in {self.path}."
        )
        if policy == "stop":
            raise TrainingError(f"{message} {_ADVICE}")
        if self.left_out > self.settings.max_left_out:
            raise TrainingError(
                f"{message} More than train.max_left_out = {self.settings.max_left_out} steps. {_ADVICE}"
            )
        logging.getLogger(__name__).warning("%s train.on_divergence=%s", message, policy)
        return policy == "rollback"

    def state_dict(self) -> dict[str, Tensor]:
        """The values of the latest steps of each kind, (n, 2) float64 each."""
        return {kind: torch.tensor(list(recent), dtype=torch.float64) for kind, recent in self._recent.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for kind, recent in self._recent.items():
            recent.clear()
            recent.extend(tuple(values) for values in state[kind].tolist())
