"""The training loop, for every arm. Read this file first, then `method.py` and `roclip/defence/defence.py`.

The loop streams batches, runs the towers, takes the loss, steps the optimizer and saves. Which caption an image is trained
with, and which terms are added to the loss, is decided by the arm's method behind `roclip.training.method.Method`.

It runs under Ray Train (`cluster/train/job.py`), under `torchrun -m roclip.training CONFIG`, or alone.
"""

import contextlib
import time
from collections.abc import Callable
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
from roclip.data.stream import open_stream
from roclip.defence.defence import Targets
from roclip.errors import StoppedError, TrainingError, without_space
from roclip.metrics.loggers import loggers
from roclip.metrics.registry import MetricsWriter
from roclip.model.towers import Towers
from roclip.training.divergence import Divergence
from roclip.training.engine import build_engine, gradient_norm, leave_out, set_lr
from roclip.training.engine import step as optimizer_step
from roclip.training.inputs import open_manifest, refuse_bad_samples, snapshot_of_epoch
from roclip.training.learning_rate import learning_rate
from roclip.training.losses import LOSSES
from roclip.training.meter import Meter
from roclip.training.method import method_of
from roclip.training.sigterm import GracefulSigterm

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
    """Train one arm in a run directory, from its last checkpoint to its last epoch.

    Args:
        arm: `clip` (undefended) or `roclip`.
        run: The run directory; the shards are in it or where `data.shards` says.
        name: Folder of this training in the run directory; empty is `arm`.
        on_start: Called on all ranks with the towers when the process group is up, and again after a rollback.
        on_epoch_end: Called on all ranks with the towers, in evaluation mode, after each epoch and before its checkpoint
            becomes LATEST; a resume repeats it only for epochs whose checkpoint was not complete.

    Returns:
        The folder of the last checkpoint. A defended training also writes `suspects.parquet` beside the checkpoints.

    Raises:
        DataError: no shards came in time, or too many samples cannot be read.
        TrainingError: a loss or gradient is not finite or spikes, and `train.on_divergence` says stop.
        CheckpointError: the checkpoint to resume from was altered.
        StageError: a disk is full.
        StoppedError: SIGTERM came; the state of the training is saved.
    """
    with GracefulSigterm() as sigterm:
        while True:
            try:
                with contextlib.suppress(_RolledBackError), contextlib.ExitStack() as closing:
                    return _train(config, arm, run, name, on_start, on_epoch_end, sigterm, closing)
            except OSError as error:
                if (no_space := without_space(error, run)) is None:
                    raise
                raise no_space from error


class _RolledBackError(Exception):
    """Training has to begin again at the last checkpoint."""


def _train(
    config: Config,
    arm: str,
    run: Path,
    name: str,
    on_start: Start | None,
    on_epoch_end: EpochEnd | None,
    sigterm: GracefulSigterm,
    closing: contextlib.ExitStack,
) -> Path:
    # ---- 1. build -------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    towers = Towers(config.model.name, model_file(config), options=config.model, loss=config.train.loss)
    if config.model.pretrained:
        towers.begin_from(Path(config.model.pretrained))
    engine = build_engine(towers, config.train)
    rank, device, loss_of = distributed.rank(), engine.device, LOSSES[config.train.loss]
    if on_start:
        on_start(towers)
    method = method_of(config, arm, towers, device, run)
    folder = run / (name or arm)
    divergence = Divergence(config.train, folder / "diverged.json")
    parts = {**method.parts, **({"divergence": divergence} if config.train.spike_factor else {})}
    manifest = open_manifest(config, run)
    stream = open_stream(manifest, config, towers.tokenize, second_edit=method.second_edit)

    # ---- 2. resume ------------------------------------------------------------------------------------------
    store = checkpoint_store(config.train.checkpoint_store, folder / "checkpoints")
    bring(folder / "checkpoints", store)
    cursor = checkpoint.resume(folder / "checkpoints", engine, towers, parts) or Cursor(0, 1, 0, 0, "plain")
    writer = checkpoint.Writer(
        folder / "checkpoints",
        keep=config.train.keep_checkpoints,
        keep_every_epochs=config.train.keep_every_epochs,
        store=store,
    )
    displays = []
    if rank == 0:
        displays = [
            MetricsWriter(folder / "metrics.jsonl", cursor.step),
            *loggers(config.train.loggers, folder, cursor.step, closing),
        ]
    step, samples_seen, first_step = cursor.step, cursor.samples_seen, cursor.step_in_epoch
    saved_at, meter = time.monotonic(), None

    for epoch in range(cursor.epoch, config.train.epochs + 1):
        # ---- 3. epoch ---------------------------------------------------------------------------------------
        snapshot = snapshot_of_epoch(config, manifest, run, epoch)
        plan = stream.plan(snapshot, epoch)
        steps, batches, bad_samples = plan.steps, stream.batches(plan, first_step), 0
        meter = meter or Meter(epoch - 1 + first_step / steps, config.train.epochs)
        meter.begin_epoch()
        towers.train()
        for step_in_epoch in range(first_step + 1, steps + 1):
            # ---- 4. step ------------------------------------------------------------------------------------
            with meter.waiting():
                batch = next(batches)
            due = 0 < config.train.checkpoint_every_s < time.monotonic() - saved_at and rank == 0
            bad, save_now, leave = _sums(len(batch.bad), due, sigterm.asked)
            bad_samples += bad
            refuse_bad_samples(batch, bad_samples, step_in_epoch, snapshot, config)
            torch.manual_seed(_seed_of_step(config.seed, step, rank))
            progress = epoch - 1 + step_in_epoch / steps
            lr = learning_rate(config.train, progress)
            set_lr(engine, lr)

            at = Position(step, samples_seen, epoch, step_in_epoch - 1, steps)
            this = method.step(batch, at, prefill=partial(stream.epoch, snapshot, 0))
            pixels = batch.images.to(device, non_blocking=True)
            pixels = augment(pixels, batch.ids, config.augment, seed=config.seed, epoch=epoch, size=towers.image_size)
            known = divergence.known(step + 1)  # a rollback went back to leave this step out
            buffers = _copy_of_buffers(towers) if known or config.train.on_divergence != "stop" else []

            (image_features, text_features, logit_scale, *bias), backward = method.forward(
                engine, pixels, this, batch, at
            )
            valid = batch.valid.to(device)
            wrong = divergence.in_features(image_features, text_features)
            targets = Targets(text_features, valid)
            if not wrong:
                targets = this.targets(image_features, text_features, valid)
            same_caption = targets.source_ids if config.pool.duplicates == "mask" else None
            loss = loss_of(
                image_features, targets.text_features, logit_scale, *bias, keep=targets.keep, same_caption=same_caption
            )
            backward(loss)
            norm = gradient_norm(engine)

            if not known:
                wrong = wrong or divergence.in_values(this.kind, loss, norm)
                if wrong and divergence.handle(step + 1, wrong, stream.where(plan, step_in_epoch - 1)):
                    writer.wait()
                    raise _RolledBackError
            if wrong or known:
                leave_out(engine, towers)
                for buffer, before in zip(towers.buffers(), buffers, strict=True):
                    buffer.copy_(before)  # the forward pass has updated batch norm
            else:
                optimizer_step(engine, towers)
                this.remember(image_features, text_features.detach(), targets)
            step += 1
            samples = min(plan.batch, plan.samples - (step_in_epoch - 1) * plan.batch)
            samples_seen += samples
            meter.step(batch, samples)

            # ---- 5. say -------------------------------------------------------------------------------------
            last, phase = step_in_epoch == steps, "plain" if this.kind == "plain" else "matched"
            if last or step % config.train.log_every_steps == 0:
                values = {key: _mean(value) for key, value in {"loss": loss, **targets.metrics}.items()}
                row = {
                    "step": step,
                    "epoch": epoch,
                    "progress": progress,
                    "epochs": config.train.epochs,
                    "epoch_shards": len(snapshot.records),
                    "phase": phase,
                    "samples_seen": samples_seen,
                    "lr": lr,
                    "logit_scale": float(logit_scale.detach()),
                    "grad_norm": float(norm),
                    "left_out_steps": divergence.left_out,
                    **method.metrics(),
                    **meter.row(progress),
                    **values,
                }
                for display in displays:
                    display.write(row)

            # ---- 6. save ------------------------------------------------------------------------------------
            if last or save_now or leave or step % config.train.checkpoint_every_steps == 0:
                distributed.mean_buffers(towers)
                if last and on_epoch_end:
                    towers.eval()
                    on_epoch_end(towers, Cursor(step, epoch, step_in_epoch, samples_seen, phase))
                    towers.train()
                done = Cursor(step, epoch + 1 if last else epoch, 0 if last else step_in_epoch, samples_seen, phase)
                writer.save(engine, towers, parts, done)
                saved_at = time.monotonic()
            if leave:
                writer.wait()
                raise StoppedError(f"{folder}: SIGTERM; saved at step {step}. The same command goes on from there.")
        first_step = 0

    writer.wait()
    if rank == 0:
        method.finish(folder, manifest)
    final = named(folder / "checkpoints", "LATEST")
    if final is None:
        raise TrainingError(f"{folder}: expected a checkpoint after {config.train.epochs} epochs, got none.")
    return final


def _sums(*counts: float) -> tuple[int, ...]:
    """Sums of the counts over the ranks, in one message."""
    return tuple(int(total) for total in distributed.all_sum(torch.tensor(counts, dtype=torch.float64)).tolist())


def _mean(value: Tensor | float) -> float:
    """The mean over the ranks of a tensor; a number is the same on all of them already."""
    if isinstance(value, Tensor):
        return float(distributed.all_sum(value.float())) / distributed.world_size()
    return value


def _copy_of_buffers(towers: Towers) -> list[Tensor]:
    return [buffer.clone() for buffer in towers.buffers()]


def _seed_of_step(seed: int, step: int, rank: int) -> int:
    """Seed of what torch draws in a step (patch dropout), so that a resume draws the same without any saved state."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
