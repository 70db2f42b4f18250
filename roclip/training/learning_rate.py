"""The learning-rate schedule."""

import math

from roclip.config import TrainConfig


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Linear warm-up to `lr`, then cosine decay to zero at the last epoch.

        lr p / w for p < w,  lr (1 + cos(pi (p - w) / (E - w))) / 2 from then on

    Args:
        progress: p, epochs done, with the fraction of the current one. Epochs, because the number of steps is not known in
            advance while ingest still runs; w is `warmup_epochs`, E `epochs`.
    """
    warmup, epochs = config.warmup_epochs, config.epochs
    if progress < warmup:
        return config.lr * progress / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(epochs - warmup, 1e-9)))
