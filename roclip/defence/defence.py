"""RoCLIP's defence: which caption each image is trained with.

A step is of one of three kinds:

- neighbour: the warm-up. Each image is trained with the caption of one of its neighbours in the pool (`neighbours.py`) instead
  of its own, so that the towers learn the data without having seen a single poisoned pair.
- plain: images are trained with their own captions, except for the suspects of the sample filter (`sample_filter.py`). A
  suspect is trained with a neighbour's caption, which associates a trigger with what the image shows.
- matched: the paper's step (arXiv:2303.06854). Each image is trained with the nearest caption of the pool (`pool.py`).

The paper's method alone is `pool.neighbours: 0`, `pool.filter_frac: [0, 0]`.
Letters: B local batch, D feature width, F length of a raw image descriptor, L tokens, P pool size.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from roclip.checkpoint.checkpoint import Stateful
from roclip.config import Config
from roclip.config.schedule import Position
from roclip.data.stream import Batch
from roclip.defence.diagnostics import diagnostics
from roclip.defence.image_descriptor import raw_descriptors
from roclip.defence.neighbours import Neighbours, Support
from roclip.defence.pool import CaptionPool
from roclip.defence.sample_filter import SampleFilter
from roclip.defence.suspicion_model import SuspicionModel
from roclip.distributed import all_sum
from roclip.model.towers import Towers

Kind = Literal["neighbour", "matched", "plain"]
_EMPTY = torch.empty(0)


@dataclass(frozen=True)
class Targets:
    """The text side of a step's contrastive loss."""

    text_features: Tensor
    """(B, D): features of the caption that each image is trained with."""
    keep: Tensor
    """(B,) bool: pairs that enter the loss."""
    source_ids: Tensor | None = None
    """(B,) int64: id of the sample that each caption comes from; None where every caption is the image's own."""
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    """Metrics of the step; tensors are averaged over the ranks before they are logged."""


class Defence:
    """The caption pool, the neighbours and the sample filter of one training.

    Args:
        poisons: What the attacker wants of each poisoned sample, by sample id. Used for metrics only; see `diagnostics`.
    """

    def __init__(self, config: Config, towers: Towers, device: torch.device, poisons: Mapping[int, str] | None = None):
        settings = config.pool
        self.config, self.towers, self.poisons = config, towers, poisons
        width = towers.cfg["embed_dim"]
        self.pool = CaptionPool(
            settings.size,
            width,
            backend=settings.backend,
            storage=settings.storage,
            shard_above=settings.shard_above,
            context_length=towers.context_length if settings.text_gradient == "live" else 0,
            device=device,
        )
        side_px = config.ingest.image_size
        filters = settings.suspicion_model and any(settings.filter_frac)
        model = SuspicionModel(side_px, device, config.seed) if filters else None
        self.sample_filter = SampleFilter(settings.filter_memory, model)
        self.parts: dict[str, Stateful] = {"pool": self.pool, "sample_filter": self.sample_filter}
        self.neighbours: Neighbours | None = None
        if settings.neighbours:
            self.neighbours = Neighbours(
                settings.size,
                width,
                towers.context_length,
                towers.vocabulary,
                neighbours=settings.neighbours,
                seed=config.seed,
            )
            self.parts["neighbours"] = self.neighbours

    def wants_prefill(self, at: Position) -> bool:
        """Whether the pool is empty and the step at `at` is the first that reads it."""
        reads = self.neighbours is not None or self.config.pool.schedule.phase(at) == "matched"
        return self.config.pool.prefill and not self.pool.count and reads

    def prefill(self, batches: Iterable[Batch]) -> None:
        """Fill the empty pool, and the neighbours with it, with the first P valid pairs of `batches`.

        Captions are encoded without gradient. Image features are zero until the warm-up replaces these pairs.
        """
        batches_held, descriptors, found = [], [], 0
        for batch in batches:
            descriptors.append(raw_descriptors(batch.images))
            batches_held.append(replace(batch, images=torch.empty(0)))
            found += int(all_sum(batch.valid.sum()))
            if found >= self.pool.size:
                break
        if self.neighbours:
            self.neighbours.fit(torch.cat(descriptors), torch.cat([batch.tokens for batch in batches_held]))
        for batch, raw in zip(batches_held, descriptors, strict=True):
            no_features = torch.zeros(len(batch.ids), self.towers.cfg["embed_dim"])
            self.enqueue(raw, no_features, self.encode(batch.tokens), batch, batch.valid, 0)

    def step(self, batch: Batch, at: Position) -> "DefendedStep":
        """Begin the step at `at`: decide its kind and, where neighbours are in use, find those of each image."""
        schedule = self.config.pool.schedule
        kind: Kind = schedule.phase(at)
        if self.neighbours and at.done(schedule.warmup.unit) < schedule.warmup.amount:
            kind = "neighbour"
        if self.neighbours is None:
            return DefendedStep(self, batch, at, kind)
        raw = raw_descriptors(batch.images)
        support = self.neighbours.by_descriptor(raw, batch.ids)
        return DefendedStep(self, batch, at, kind, raw, support, self.neighbours.representative(support))

    def filter_share(self, at: Position) -> float:
        """Share of a plain global batch that the sample filter suspects: linear over the epochs of the training."""
        start, end = self.config.pool.filter_frac
        return start + (end - start) * float(at.done("epochs")) / self.config.train.epochs

    def enqueue(
        self, raw: Tensor, image_features: Tensor, text_features: Tensor, batch: Batch, enter: Tensor, step: int
    ) -> None:
        """Write the pairs chosen by `enter` (B,) into the pool and, in the same order, into the neighbours."""
        self.pool.enqueue(text_features.detach(), batch.ids.to(self.pool.ids.device), batch.tokens, step, enter)
        if self.neighbours:
            images, texts = image_features.detach().cpu(), text_features.detach().cpu()
            self.neighbours.enqueue(raw, images, texts, batch.tokens, batch.ids, enter.cpu())

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) to unit-length text features (B, D), without gradient."""
        return self.towers.encode_text(tokens.to(self.pool.features.device))


@dataclass(frozen=True)
class DefendedStep:
    """One step of a defended training, on one rank."""

    defence: Defence
    batch: Batch
    at: Position
    kind: Kind
    raw: Tensor = _EMPTY
    """(B, F) raw image descriptors; empty without neighbours."""
    support: Support | None = None
    """The neighbours by image descriptor, on which nothing that is learned has an influence."""
    representative: Tensor = _EMPTY
    """(B,) int64: pool slot of the neighbour whose caption replaces an image's own one."""

    @property
    def tokens(self) -> Tensor:
        """(B, L): the captions that the text tower encodes."""
        if self.kind != "neighbour" or self.defence.neighbours is None:
            return self.batch.tokens
        return self.defence.neighbours.tokens[self.representative].to(self.batch.tokens.dtype)

    def targets(self, image_features: Tensor, text_features: Tensor, valid: Tensor) -> Targets:
        """The captions that the images are trained with, given the step's features (B, D) and the valid pairs (B,)."""
        if self.kind == "matched":
            return self._matched(image_features, valid)
        if self.kind == "neighbour":
            return self._of_neighbours(text_features, valid)
        share = self.defence.filter_share(self.at)
        return self._filtered(image_features, text_features, valid, share) if share else Targets(text_features, valid)

    def remember(self, image_features: Tensor, text_features: Tensor, targets: Targets) -> None:
        """Write the own captions of the pairs that entered the loss into the pool, except for those of suspects."""
        if self.kind != "matched" and self.defence.config.pool.update == "matched_only":
            return
        enter, own = targets.keep, text_features
        if self.kind == "neighbour":
            own = self.defence.encode(self.batch.tokens)
        elif self.kind == "plain" and targets.source_ids is not None:
            enter = enter & (targets.source_ids == self.batch.ids.to(enter.device))
        self.defence.enqueue(self.raw, image_features, own, self.batch, enter, self.at.step)

    def _matched(self, image_features: Tensor, valid: Tensor) -> Targets:
        pool, settings = self.defence.pool, self.defence.config.pool
        ids = self.batch.ids.to(valid.device)
        match = pool.nearest(image_features)
        metrics = diagnostics(pool, match, ids, self.at.step, valid=valid, poisons=self.defence.poisons)
        found = match.features
        if settings.text_gradient == "live":
            found = self.defence.towers.encode_text(pool.tokens[match.slots].long())
        return Targets(found, valid, pool.ids[match.slots].to(valid.device), metrics)

    def _of_neighbours(self, text_features: Tensor, valid: Tensor) -> Targets:
        neighbours = self.defence.neighbours
        if neighbours is None or self.support is None:
            raise AssertionError("a neighbour step without neighbours")
        ids = self.batch.ids.to(valid.device)
        if self.defence.filter_share(self.at):  # scores and suspicion model begin to learn; nothing is suspected yet
            agreement = neighbours.bag_of_words_agreement(self.support, self.batch.tokens)
            self.defence.sample_filter.suspects([agreement], ids, valid, self.batch.images, share=0.0)
        source_ids = neighbours.ids[self.representative].to(ids.device)
        return Targets(text_features, valid, source_ids, self._poison_matches(source_ids, valid))

    def _filtered(self, image_features: Tensor, text_features: Tensor, valid: Tensor, share: float) -> Targets:
        pool, neighbours, batch = self.defence.pool, self.defence.neighbours, self.batch
        ids = batch.ids.to(valid.device)
        if not (neighbours or pool.full):
            return Targets(text_features, valid)
        agreements = [pool.agreement(image_features, text_features)]
        if neighbours and self.support:
            images, texts = image_features.detach().cpu(), text_features.detach().cpu()
            by_feature = neighbours.by_image_feature(images, batch.ids)
            agreements.append(neighbours.image_agreement(images, texts))
            agreements += [neighbours.text_agreement(support, texts) for support in (by_feature, self.support)]
        suspected = self.defence.sample_filter.suspects(agreements, ids, valid, batch.images, share)
        metrics = {"agreement": agreements[0].mean(), "suspected": float(all_sum(suspected.sum()))}
        if neighbours is None:
            keep = valid & ~suspected
            return Targets(text_features, keep, ids, metrics | self._poison_matches(ids, keep))
        slots = self.representative.to(valid.device)
        source_ids = torch.where(suspected, pool.ids[slots].to(ids.device), ids)
        tokens = neighbours.tokens[self.representative].to(text_features.device).long()
        replacement = self.defence.towers.encode_text(tokens)
        text_features = torch.where(suspected[:, None], replacement, text_features)
        return Targets(text_features, valid, source_ids, metrics | self._poison_matches(source_ids, valid))

    def _poison_matches(self, source_ids: Tensor, keep: Tensor) -> dict[str, float]:
        """How many poisoned images the global batch has, and how many of them are trained with a caption of a poison that
        has the same aim."""
        poisons = self.defence.poisons
        if not poisons:
            return {}
        rows = zip(self.batch.ids.tolist(), source_ids.tolist(), keep.tolist(), strict=True)
        aims = [(poisons[own], poisons.get(other), kept) for own, other, kept in rows if own in poisons]
        met = sum(aim == other and kept for aim, other, kept in aims)
        seen, met = all_sum(torch.tensor([len(aims), met], device=keep.device)).tolist()
        return {"poisons_seen": float(seen), "poisons_met": float(met)}
