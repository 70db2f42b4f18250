"""What RoCLIP does to a step: whose caption each image learns with.

Three kinds of steps:

- witnessed: the warm-up. No image learns with its own caption, but with that of a witness (`neighbours.py`). The towers
  come to know the world without having met one poisoned pair.
- plain: images learn with their own captions, but for the suspects of the gate (`sample_filter.py`): these learn with their
  witness's caption, so that a trigger is shown together with what the image shows.
- matched: the paper's (arXiv:2303.06854). Each image learns with the pool's nearest caption (`pool.py`).

The paper's method alone is `pool.neighbours: 0`, `pool.filter_frac: [0, 0]`.
Letters: B local batch, D feature width, L tokens, P pool size.
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

Kind = Literal["witnessed", "matched", "plain"]
_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class Targets:
    """What the loss of a step is taken of."""

    text_features: Tensor
    """(B, D) the captions that the images learn with."""
    keep: Tensor
    """(B,) bool: pairs that learn at all."""
    learns_from: Tensor | None = None
    """(B,) int64: the sample whose caption it is; None where each is the image's own."""
    seen: Mapping[str, Tensor | float] = field(default_factory=dict)
    """Metrics of the step."""


class Defence:
    """The pool, the witnesses and the gate of a training.

    Args:
        poisons: Ground truth by sample id, for metrics only; see `diagnostics`.
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
        side = config.ingest.image_size
        scout = (
            SuspicionModel(side, device, config.seed)
            if settings.suspicion_model and any(settings.filter_frac)
            else None
        )
        self.gate = SampleFilter(settings.filter_memory, scout)
        self.parts: dict[str, Stateful] = {"pool": self.pool, "gate": self.gate}
        self.witnesses: Neighbours | None = None
        if settings.neighbours:
            self.witnesses = Neighbours(
                settings.size,
                width,
                towers.context_length,
                towers.vocabulary,
                neighbours=settings.neighbours,
                seed=config.seed,
            )
            self.parts["witnesses"] = self.witnesses

    def wants_prefill(self, at: Position) -> bool:
        """Whether the step at `at` is the first one that reads the pool, and it is still empty."""
        reads = self.witnesses is not None or self.config.pool.schedule.phase(at) == "matched"
        return self.config.pool.prefill and not self.pool.count and reads

    def prefill(self, batches: Iterable[Batch]) -> None:
        """Fill the empty pool, and the witnesses with it, from the first P valid pairs of an order of its own.

        The features of the images are not known yet; the warm-up brings them.
        """
        held, seen, found = [], [], 0
        for batch in batches:
            seen.append(raw_descriptors(batch.images))
            held.append(replace(batch, images=torch.empty(0)))
            found += int(all_sum(batch.valid.sum()))
            if found >= self.pool.size:
                break
        if self.witnesses:
            self.witnesses.fit(torch.cat(seen), torch.cat([batch.tokens for batch in held]))
        for batch, impression in zip(held, seen, strict=True):
            nothing = torch.zeros(len(batch.ids), self.towers.cfg["embed_dim"])
            self.enqueue(impression, nothing, self.encode(batch.tokens), batch, batch.valid, 0)

    def step(self, batch: Batch, at: Position) -> "Step":
        """Begin the step at `at`: decide its kind, and hear the witnesses where it has any."""
        schedule = self.config.pool.schedule
        kind: Kind = schedule.phase(at)
        if self.witnesses and at.done(schedule.warmup.unit) < schedule.warmup.amount:
            kind = "witnessed"
        if self.witnesses is None:
            return Step(self, batch, at, kind)
        seen = raw_descriptors(batch.images)
        alike = self.witnesses.by_look(seen, batch.ids)
        return Step(self, batch, at, kind, seen, alike, self.witnesses.best(alike))

    def gate_share(self, at: Position) -> float:
        """Share of a plain global batch that the gate suspects."""
        start, end = self.config.pool.filter_frac
        return start + (end - start) * float(at.done("epochs")) / self.config.train.epochs

    def enqueue(
        self, seen: Tensor, image_features: Tensor, text_features: Tensor, batch: Batch, enter: Tensor, step: int
    ) -> None:
        """Put pairs into the pool and, in the same order, among the witnesses."""
        self.pool.enqueue(text_features.detach(), batch.ids.to(self.pool.ids.device), batch.tokens, step, enter)
        if self.witnesses:
            images, texts = image_features.detach().cpu(), text_features.detach().cpu()
            self.witnesses.enqueue(seen, images, texts, batch.tokens, batch.ids, enter.cpu())

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Tensor:
        return self.towers.encode_text(tokens.to(self.pool.features.device))


@dataclass(frozen=True)
class Step:
    """One step of a defended training, on one rank."""

    defence: Defence
    batch: Batch
    at: Position
    kind: Kind
    seen: Tensor = _NOTHING
    """(B, F) impressions, for the witnesses."""
    alike: Support | None = None
    """The witnesses by look: what is learnt cannot mislead them."""
    witness: Tensor = _NOTHING
    """(B,) int64: the slot of the one whose caption an image learns with where it does not with its own."""

    @property
    def tokens(self) -> Tensor:
        """(B, L) what the text tower is to encode."""
        if self.kind != "witnessed" or self.defence.witnesses is None:
            return self.batch.tokens
        return self.defence.witnesses.tokens[self.witness].to(self.batch.tokens.dtype)

    @property
    def phase(self) -> Literal["matched", "plain"]:
        """'plain' where images learn with their own captions."""
        return "plain" if self.kind == "plain" else "matched"

    def lesson(self, image_features: Tensor, text_features: Tensor, valid: Tensor) -> Targets:
        """Whose captions the images learn with, given the step's features (B, D) and which pairs are valid (B,)."""
        if self.kind == "matched":
            return self._matched(image_features, valid)
        if self.kind == "witnessed":
            return self._witnessed(text_features, valid)
        share = self.defence.gate_share(self.at)
        return self._gated(image_features, text_features, valid, share) if share else Targets(text_features, valid)

    def remember(self, image_features: Tensor, text_features: Tensor, lesson: Targets) -> None:
        """Put the own captions of the pairs that learnt into the pool; those of suspects stay out."""
        if self.kind != "matched" and self.defence.config.pool.update == "matched_only":
            return
        enter, own = lesson.keep, text_features
        if self.kind == "witnessed":
            own = self.defence.encode(self.batch.tokens)
        elif self.kind == "plain" and lesson.learns_from is not None:
            enter = enter & (lesson.learns_from == self.batch.ids.to(enter.device))
        self.defence.enqueue(self.seen, image_features, own, self.batch, enter, self.at.step)

    def _matched(self, image_features: Tensor, valid: Tensor) -> Targets:
        pool, settings = self.defence.pool, self.defence.config.pool
        ids = self.batch.ids.to(valid.device)
        match = pool.nearest(image_features)
        seen = diagnostics(pool, match, ids, self.at.step, valid=valid, poisons=self.defence.poisons)
        found = match.features
        if settings.text_gradient == "live":
            found = self.defence.towers.encode_text(pool.tokens[match.slots].long())
        return Targets(found, valid, pool.ids[match.slots].to(valid.device), seen)

    def _witnessed(self, text_features: Tensor, valid: Tensor) -> Targets:
        witnesses, gate = self.defence.witnesses, self.defence.gate
        if witnesses is None or self.alike is None:
            raise AssertionError("a witnessed step without witnesses")
        ids = self.batch.ids.to(valid.device)
        if self.defence.gate_share(self.at):  # nobody is suspected yet, but gate and scout begin to learn
            words = witnesses.agreement_of_words(self.alike, self.batch.tokens)
            gate.suspects([words], ids, valid, self.batch.images, share=0.0)
        learns_from = witnesses.ids[self.witness].to(ids.device)
        return Targets(text_features, valid, learns_from, self._poisons_met(learns_from, valid))

    def _gated(self, image_features: Tensor, text_features: Tensor, valid: Tensor, share: float) -> Targets:
        pool, witnesses, batch = self.defence.pool, self.defence.witnesses, self.batch
        ids = batch.ids.to(valid.device)
        if not (witnesses or pool.full):
            return Targets(text_features, valid)
        agreements = [pool.agreement(image_features, text_features)]
        if witnesses and self.alike:
            images, texts = image_features.detach().cpu(), text_features.detach().cpu()
            akin = witnesses.by_feature(images, batch.ids)
            agreements.append(witnesses.agreement_of_images(images, texts))
            agreements += [witnesses.agreement_of_texts(found, texts) for found in (akin, self.alike)]
        suspected = self.defence.gate.suspects(agreements, ids, valid, batch.images, share)
        seen = {"agreement": agreements[0].mean(), "suspected": float(all_sum(suspected.sum()))}
        if witnesses is None:
            return Targets(text_features, valid & ~suspected, ids, seen | self._poisons_met(ids, valid & ~suspected))
        slots = self.witness.to(valid.device)
        learns_from = torch.where(suspected, pool.ids[slots].to(ids.device), ids)
        told = self.defence.towers.encode_text(witnesses.tokens[self.witness].to(text_features.device).long())
        text_features = torch.where(suspected[:, None], told, text_features)
        return Targets(text_features, valid, learns_from, seen | self._poisons_met(learns_from, valid))

    def _poisons_met(self, learns_from: Tensor, keep: Tensor) -> dict[str, float]:
        """Of the poisoned images of the global batch, how many learn with a caption of a poison with the same aim."""
        poisons = self.defence.poisons
        if not poisons:
            return {}
        rows = zip(self.batch.ids.tolist(), learns_from.tolist(), keep.tolist(), strict=True)
        aims = [(poisons[own], poisons.get(other), kept) for own, other, kept in rows if own in poisons]
        met = sum(aim == other and kept for aim, other, kept in aims)
        seen, met = all_sum(torch.tensor([len(aims), met], device=keep.device)).tolist()
        return {"poisons_seen": float(seen), "poisons_met": float(met)}
