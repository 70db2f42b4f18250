"""What a step's numbers say before its update: go on, or that training diverges, and what is done about it then.

Every rank sees the same numbers, so every rank answers the same. What was left out, and why, stands in `diverged.json` beside
`metrics.jsonl`, with the shard and key of every sample of the batch.
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
"""Steps of a kind whose median a spike is measured by."""
LEAST = 16
"""Of these that must have been seen."""
_KINDS = ("plain", "witnessed", "matched")
_NAMES = ("loss", "gradient norm")
_ADVICE = (
    "Lower train.lr, set train.grad_clip_norm, use train.precision=fp32, or let such steps be left out with "
    "train.on_divergence=skip or rollback; the same command resumes from the last checkpoint."
)


class Divergence:
    """Judges the steps of one training, and remembers those that were left out.

        spike: value > spike_factor x median of the values of the last 64 steps of the kind, from the 17th on

    for the loss and for the gradient norm; kinds apart, since a matched step's loss is another quantity than a plain one's.
    A part of a checkpoint (`checkpoint.Part`), so that a resume judges alike.

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
        """Whether training went back to leave this step out."""
        return step in self.records and self.records[step]["done"] == "rollback"

    def in_features(self, image_features: Tensor, text_features: Tensor) -> str:
        """Why the features of a step cannot be learnt from, before the gate sees them, or ""."""
        total = distributed.all_sum(image_features.sum() + text_features.sum())
        return "" if torch.isfinite(total) else "features not finite"

    def in_values(self, kind: str, loss: Tensor, gradient_norm: Tensor) -> str:
        """Why a step of a kind (`plain`, `witnessed`, `matched`) must not be taken, or "". What may be is remembered."""
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
        """Note a step that must not be taken, and say whether to go back to the last checkpoint; else it is left out.

        Args:
            samples: Shard and key of all samples of the global batch.

        Raises `TrainingError` if the config says stop, or if more than `max_left_out` steps were left out.
        """
        policy = self.settings.on_divergence
        self.records[step] = {"step": step, "why": why, "done": policy, "samples": samples}
        if distributed.rank() == 0:
            write_atomic(self.path, json.dumps(list(self.records.values()), indent=1))
        told = (
            f"step {step}: {why}, before the update. Samples: {', '.join(samples[:3])} and {len(samples) - 3} more, "
            f"in {self.path}."
        )
        if policy == "stop":
            raise TrainingError(f"{told} {_ADVICE}")
        if self.left_out > self.settings.max_left_out:
            raise TrainingError(f"{told} More than train.max_left_out = {self.settings.max_left_out} steps. {_ADVICE}")
        logging.getLogger(__name__).warning("%s train.on_divergence=%s", told, policy)
        return policy == "rollback"

    def state_dict(self) -> dict[str, Tensor]:
        """The values of the last steps of each kind."""
        return {kind: torch.tensor(list(recent), dtype=torch.float64) for kind, recent in self._recent.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        for kind, recent in self._recent.items():
            recent.clear()
            recent.extend(tuple(values) for values in state[kind].tolist())
