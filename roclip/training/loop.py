"""The training loop: plain CLIP, or CLIP defended by RoCLIP. Read this file first, then `defence.py`.

The loop streams batches, runs the towers, takes the loss and saves. Whose caption an image learns with is its own here;
under a defence it is what the pool, the witnesses and the gate say.

Runs under Ray Train (`cluster/train/job.py`), under `torchrun -m roclip.training CONFIG`, or alone.
Letters: B local batch, G global batch, D feature width, L caption tokens.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roclip import distributed
from roclip.checkpoint import checkpoint
from roclip.checkpoint.pointers import Cursor, named
from roclip.checkpoint.store import bring, checkpoint_store
from roclip.config import Config, model_file
from roclip.config.schedule import Position
from roclip.data.augment import augment
from roclip.data.cache import shard_cache
from roclip.data.eda import caption_edits
from roclip.data.ground_truth import poisoned_samples
from roclip.data.shards import Manifest
from roclip.data.stream import Batch, Snapshot, Stream, take_snapshot, wait_for_shards
from roclip.data.tar_sources import index_tars, is_pattern, shards_root
from roclip.defence.defence import Defence, Targets
from roclip.defence.suspects import write_suspects
from roclip.errors import DataError, StoppedError, TrainingError, without_space
from roclip.metrics.loggers import loggers
from roclip.metrics.registry import MetricsWriter
from roclip.model.towers import Towers
from roclip.storage import write_atomic
from roclip.training import accumulate
from roclip.training.divergence import Divergence
from roclip.training.engine import build_engine, gradient_norm, leave_out, set_lr
from roclip.training.engine import step as optimizer_step
from roclip.training.losses import LOSSES
from roclip.training.meter import Meter
from roclip.training.repair_losses import repair_losses
from roclip.training.sigterm import SigtermAsWish

EpochEnd = Callable[[Towers, Cursor], None]
Start = Callable[[Towers], None]


def train(
    config: Config,
    arm: str,
    run: Path,
    *,
    name: str = "",
    on_start: Start | None = None,
    on_epoch_end: EpochEnd | None = None,
) -> Path:
    """Train one arm in a run directory, from where it stands to its last epoch.

    Args:
        arm: `clip` (undefended) or `roclip`.
        run: The run directory; the shards lie in it or where `data.shards` says.
        name: Folder of this training in the run directory; empty is `arm`.
        on_start: Called on all ranks with the towers when the ranks have met, and again after a rollback.
        on_epoch_end: Called on all ranks with the towers (in evaluation mode) after each epoch, before its checkpoint
            is named; a resume repeats it only for epochs whose checkpoint was not complete.

    Returns:
        The last checkpoint's folder. A defended training leaves `suspects.parquet` beside the checkpoints.

    Raises:
        DataError: no shards came in time, or too many samples cannot be read.
        TrainingError: a loss or gradient is not finite or a spike, and `train.on_divergence` says stop.
        CheckpointError: the checkpoint to resume from was altered.
        StageError: a disk is full.
        StoppedError: SIGTERM came, and where training stood is saved.
    """
    with SigtermAsWish() as leaving:
        while True:
            try:
                with contextlib.suppress(_RolledBackError), contextlib.ExitStack() as closing:
                    return _train(config, arm, run, name, on_start, on_epoch_end, leaving, closing)
            except OSError as error:
                if (told := without_space(error, run)) is None:
                    raise
                raise told from error


class _RolledBackError(Exception):
    """Training is to begin again at the last checkpoint."""


def _train(
    config: Config,
    arm: str,
    run: Path,
    name: str,
    on_start: Start | None,
    on_epoch_end: EpochEnd | None,
    leaving: SigtermAsWish,
    closing: contextlib.ExitStack,
) -> Path:
    # ---- build ----------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    towers = Towers(config.model.name, model_file(config), options=config.model, loss=config.train.loss)
    if config.model.pretrained:
        towers.begin_from(Path(config.model.pretrained))
    engine = build_engine(towers, config.train)
    rank, world_size, device = distributed.rank(), distributed.world_size(), engine.device
    if on_start:
        on_start(towers)
    defence = Defence(config, towers, device, _ground_truth(run)) if arm == "roclip" else None
    repair = repair_losses(config, towers, device)
    folder = run / (name or arm) / "checkpoints"
    divergence = Divergence(config.train, folder.parent / "diverged.json")
    parts = {**(defence.parts if defence else {}), **({"divergence": divergence} if config.train.spike_factor else {})}
    manifest = _shards(config, run)
    stream = Stream(
        manifest.root,
        tokenize=towers.tokenize,
        image_size=config.ingest.image_size,
        global_batch_size=config.train.global_batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        streams=config.data.streams,
        shuffle_buffer=config.data.shuffle_buffer,
        last_batch=config.data.last_batch,
        weights=dict(zip(config.data.shards.split("::"), config.data.upsampling, strict=False)),
        resampled=config.data.resampled,
        pieces=config.train.grad_accum_steps,
        workers=config.data.loader_workers,
        cache=shard_cache(config.data),
        edit=caption_edits(config.augment, config.seed),
        second_edit=repair.edit if repair else None,
        caption_key=config.data.caption_key,
    )
    # ---- resume ---------------------------------------------------------------------------------------------
    store = checkpoint_store(config.train.checkpoint_store, folder)
    bring(folder, store)
    cursor = checkpoint.resume(folder, engine, towers, parts) or Cursor(0, 1, 0, 0, "plain")
    writer = checkpoint.Writer(
        folder, keep=config.train.keep_checkpoints, keep_every_epochs=config.train.keep_every_epochs, store=store
    )
    displays = []
    if rank == 0:
        displays = [
            MetricsWriter(folder.parent / "metrics.jsonl", cursor.step),
            *loggers(config.train.loggers, folder.parent, cursor.step, closing),
        ]
    step, samples_seen, first_step = cursor.step, cursor.samples_seen, cursor.step_in_epoch
    first_epoch, phase, saved_at, meter = cursor.epoch, cursor.phase, time.monotonic(), None

    for epoch in range(first_epoch, config.train.epochs + 1):
        # ---- an epoch ---------------------------------------------------------------------------------------
        snapshot = _agree_on_snapshot(config, manifest, run, epoch)
        plan = stream.plan(snapshot, epoch)
        steps, batches, bad_samples = plan.steps, stream.batches(plan, first_step), 0
        meter = meter or Meter(epoch - 1 + first_step / steps, config.train.epochs)
        meter.begin_epoch()
        towers.train()
        for step_in_epoch in range(first_step + 1, steps + 1):
            # ---- a step -------------------------------------------------------------------------------------
            with meter.waiting():
                batch = next(batches)
            due = 0 < config.train.checkpoint_every_s < time.monotonic() - saved_at and rank == 0
            bad, save_now, leave = _agree_on_counts(len(batch.bad), due, leaving.asked)
            bad_samples += bad
            _check_bad(batch, bad_samples, step_in_epoch, snapshot, config)
            torch.manual_seed(_seed_of_step(config.seed, step, rank))
            lr = learning_rate(config, epoch - 1 + step_in_epoch / steps)
            set_lr(engine, lr)
            at = Position(step, samples_seen, epoch, step_in_epoch - 1, steps)
            if defence and defence.wants_prefill(at):
                defence.prefill(stream.epoch(snapshot, 0))
            defended = defence.step(batch, at) if defence else None
            phase = defended.phase if defended else "plain"
            pixels = batch.images.to(device, non_blocking=True)
            pixels = augment(pixels, batch.ids, config.augment, seed=config.seed, epoch=epoch, size=towers.image_size)
            may_leave_out = config.train.on_divergence != "stop" or divergence.known(step + 1)
            buffers = [buffer.clone() for buffer in towers.buffers()] if may_leave_out else []
            forward = partial(repair.forward, batch=batch, epoch=epoch) if repair else accumulate.forward
            (image_features, text_features, logit_scale, *bias), backward = forward(
                engine,
                pixels,
                (defended.tokens if defended else batch.tokens).to(device),
                pieces=config.train.grad_accum_steps,
                text_gradient=not defended or defended.kind != "matched",
            )
            lesson = Targets(text_features, batch.valid.to(device))
            wrong = divergence.in_features(image_features, text_features)
            if defended and not wrong:
                lesson = defended.lesson(image_features, text_features, lesson.keep)
            loss = LOSSES[config.train.loss](
                image_features,
                lesson.text_features,
                logit_scale,
                *bias,
                keep=lesson.keep,
                same_caption=lesson.learns_from if config.pool.duplicates == "mask" else None,
            )
            backward(loss)
            norm = gradient_norm(engine)
            if not divergence.known(step + 1):
                wrong = wrong or divergence.in_values(defended.kind if defended else "plain", loss, norm)
                if wrong and divergence.handle(step + 1, wrong, stream.where(plan, step_in_epoch - 1)):
                    writer.wait()
                    raise _RolledBackError
            if wrong or divergence.known(step + 1):
                leave_out(engine, towers)
                for buffer, before in zip(towers.buffers(), buffers, strict=True):
                    buffer.copy_(before)  # batch norm has seen the step
            else:
                optimizer_step(engine, towers)
                if defended:
                    defended.remember(image_features, text_features.detach(), lesson)
            step += 1
            samples = min(plan.batch, plan.samples - (step_in_epoch - 1) * plan.batch)
            samples_seen += samples
            meter.step(batch, samples)
            # ---- say and save -------------------------------------------------------------------------------
            last = step_in_epoch == steps
            if last or step % config.train.log_every_steps == 0:
                values = {name: _mean(value) for name, value in {"loss": loss, **lesson.seen}.items()}
                row = {
                    "step": step,
                    "epoch": epoch,
                    "progress": epoch - 1 + step_in_epoch / steps,
                    "epochs": config.train.epochs,
                    "epoch_shards": len(snapshot.records),
                    "phase": phase,
                    "samples_seen": samples_seen,
                    "lr": lr,
                    "logit_scale": float(logit_scale.detach()),
                    "grad_norm": float(norm),
                    "left_out_steps": divergence.left_out,
                    **({"pool_count": defence.pool.count} if defence else {}),
                    **meter.row(epoch - 1 + step_in_epoch / steps),
                    **values,
                }
                for display in displays:
                    display.write(row)
            if last or save_now or leave or step % config.train.checkpoint_every_steps == 0:
                distributed.mean_buffers(towers)
                done = Cursor(step, epoch + 1 if last else epoch, 0 if last else step_in_epoch, samples_seen, phase)
                if last and on_epoch_end:
                    towers.eval()
                    on_epoch_end(towers, Cursor(step, epoch, step_in_epoch, samples_seen, phase))
                    towers.train()
                writer.save(engine, towers, parts, done)
                saved_at = time.monotonic()
            if leave:
                writer.wait()
                raise StoppedError(
                    f"{folder.parent}: SIGTERM; saved at step {step}. The same command goes on from there."
                )
        first_step = 0
    writer.wait()
    if defence and rank == 0:
        write_suspects(folder.parent / "suspects.parquet", defence.gate.scores, manifest)
    final = named(folder, "LATEST")
    if final is None:
        raise TrainingError(f"{folder}: expected a checkpoint after {config.train.epochs} epochs, got none.")
    return final


def learning_rate(config: Config, progress: float) -> float:
    """Linear warm-up, then cosine to zero, over epochs (so that it does not need the number of steps in advance)."""
    warmup, epochs = config.train.warmup_epochs, config.train.epochs
    if progress < warmup:
        return config.train.lr * progress / warmup
    return config.train.lr * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(epochs - warmup, 1e-9)))


def _shards(config: Config, run: Path) -> Manifest:
    """The manifest of the run's shards. Rank 0 indexes tars that somebody else made; the others wait at the file, as a
    collective would time out."""
    manifest = Manifest(shards_root(config.data.shards, run))
    if is_pattern(config.data.shards):
        if distributed.rank() == 0:
            log = logging.getLogger(__name__)
            index_tars(
                config.data.shards, manifest.root, on_progress=lambda done, total, text: log.info("index %s", text)
            )
        while manifest.summary is None:
            time.sleep(1.0)
    return manifest


def _agree_on_snapshot(config: Config, manifest: Manifest, run: Path, epoch: int) -> Snapshot:
    """Rank 0 decides which shards an epoch has and records it: a resume and the other arms see the same data."""

    def decide() -> Sequence[str]:
        path = run / "snapshots" / f"epoch-{epoch:05d}.json"
        if path.exists():
            names = json.loads(path.read_text())["shards"]
            wait_for_shards(manifest, 1, config.data.wait_s, names)  # a replay may be ahead of its ingest
            return names
        wait_for_shards(manifest, config.data.min_shards, config.data.wait_s)
        snapshot = take_snapshot(manifest)
        record = {"epoch": epoch, "digest": snapshot.digest, "samples": snapshot.samples, "shards": snapshot.names}
        write_atomic(path, json.dumps(record, indent=1))
        return snapshot.names

    return take_snapshot(manifest, distributed.lead(decide))


def _agree_on_counts(*counts: float) -> tuple[int, ...]:
    """Sums over the ranks, in one message."""
    return tuple(int(total) for total in distributed.all_sum(torch.tensor(counts, dtype=torch.float64)).tolist())


def _seed_of_step(seed: int, step: int, rank: int) -> int:
    """Of what torch draws in a step (patch dropout): a resume draws the same without any state."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def _check_bad(batch: Batch, bad: int, step_in_epoch: int, snapshot: Snapshot, config: Config) -> None:
    if bad > config.data.max_bad_frac * snapshot.samples:
        named = "; ".join(f"{name}: {reason}" for name, reason in batch.bad[:5]) or "on another rank"
        raise DataError(
            f"{bad} samples of this epoch cannot be read after {step_in_epoch} steps, more than data.max_bad_frac = "
            f"{config.data.max_bad_frac} of {snapshot.samples}. The last: {named}. "
            "Bring the shard back as it was, or take its record out of the manifest (its own .json, or the pack that it is "
            "in) and run ingest again, which redoes it; or raise data.max_bad_frac."
        )


def _ground_truth(run: Path) -> dict[int, str]:
    """What the attacker wants of each poisoned sample, where a run knows its poisons: for metrics only."""
    rows = poisoned_samples(run).to_pylist()
    return {row["id"]: f"{row['attack']}: {row['target_label']}" for row in rows}


def _mean(value: Tensor | float) -> float:
    if isinstance(value, Tensor):
        return float(distributed.all_sum(value.float())) / distributed.world_size()
    return value
