"""The caption pool and the defence that is built on it."""

from dataclasses import dataclass
from typing import Literal

from roclip.config.schedule import Schedule
from roclip.config.strict import fraction, positive
from roclip.errors import ConfigError


@dataclass(frozen=True)
class PoolConfig:
    """The caption pool and what it is used for; see `roclip/defence/defence.py`.

    The paper's method is `neighbours: 0`, `match_every: 2`, `warmup: 1`, `filter_frac: [0, 0]`, `duplicates: keep`.
    """

    size: int = 21_845
    """Number of pairs in the pool. The paper uses 2 % of the data."""
    neighbours: int = 32
    """Number of the pool's most similar images that are consulted about an image; 0 turns neighbours off, as in the paper."""
    warmup: int | str = 2
    """Length of the warm-up at the start: epochs, or a duration such as `1000 steps`. With neighbours, images learn with a
    neighbour's caption meanwhile; without, with their own, and nothing is matched yet."""
    filter_frac: tuple[float, float] = (0.3, 0.06)
    """Share of a plain global batch that the sample filter suspects, at the start and at the end of training (linear in
    between); (0, 0) turns it off. Suspects learn with a neighbour's caption, or are left out if there are no neighbours."""
    suspicion_model: bool = True
    """Let the sample filter also learn what the images of suspects have in common: the trigger, if there is one."""
    filter_memory: float = 0.7
    """Weight, from 0 to 1, of an image's earlier visits in its running score: an image that was suspected once is not
    cleared at once."""
    match_every: int | str = 0
    """Length of a period whose last part is matched: epochs, or a duration such as `2 steps` or `5_000_000 samples`; 0
    turns matching off. `2` is the paper's K: every second epoch, counted from 1."""
    match_frac: float = 0.0
    """Share of a period that is matched; 0 is the last epoch or step of a period, or half of a period of samples."""
    prefill: bool = True
    """Fill an empty pool before the first step that reads it, with captions that are encoded without gradient."""
    text_gradient: Literal["none", "live"] = "none"
    """Gradient into captions of the pool: `none` takes their stored features as constants (the paper); `live` stores tokens
    and encodes them again."""
    update: Literal["always", "matched_only"] = "always"
    """Steps in which captions enter the pool; `matched_only` is what the official code does."""
    duplicates: Literal["keep", "mask"] = "mask"
    """Images that learn with the same caption of the pool: `keep` them as each other's negatives (the paper), or `mask`
    them out."""
    backend: Literal["auto", "faiss", "torch"] = "auto"
    """Library that searches the pool; `auto` takes whichever is measured faster at the start. All give the same bits."""
    storage: Literal["fp32", "fp16"] = "fp32"
    """Precision of the stored features; scores are summed in float64 either way."""
    shard_above: int = 1 << 20
    """Number of captions up to which every rank holds the whole pool; a larger pool is divided among the ranks."""

    @property
    def schedule(self) -> Schedule:
        """When steps are matched."""
        return Schedule.of(self.match_every, self.match_frac, self.warmup)

    def __post_init__(self) -> None:
        positive(self, "pool", "size", "shard_above")
        fraction(self, "pool", "filter_memory", "match_frac")
        if not all(0 <= share <= 1 for share in self.filter_frac):
            raise ConfigError(f"pool.filter_frac: expected two shares from 0 to 1, got {self.filter_frac}.")
        if self.neighbours < 0:
            raise ConfigError(f"pool.neighbours: expected 0 or more, got {self.neighbours}.")
        if not self.prefill and (self.neighbours or self.update == "matched_only"):
            raise ConfigError("pool.prefill: neighbours, and update=matched_only, need a filled pool. Set it to true.")
        if self.neighbours and self.update == "matched_only":
            raise ConfigError("pool.update: neighbours are renewed in all steps. Set always, or pool.neighbours=0.")
        _ = self.schedule
