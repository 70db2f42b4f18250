"""The training loop: plain CLIP, or CLIP defended by RoCLIP. Read this file first, then `defence.py`.

The loop streams batches, runs the towers, takes the loss and saves. Whose caption an image learns with is its own here;
under a defence it is what the pool, the witnesses and the gate say.

Runs under Ray Train (`cluster/train_job.py`), under `torchrun -m roclip.train CONFIG`, or alone.
Letters: B local batch, G global batch, D feature width, L caption tokens.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roclip import accumulate, checkpoint, distributed
from roclip.augment import augment
from roclip.checkpoint import Cursor
from roclip.checkpoint_store import bring, checkpoint_store
from roclip.config import Config, dump_config, environment_defaults, load_config, model_file, run_directory
from roclip.defence import Defence, Lesson
from roclip.engine import build_engine, set_lr
from roclip.engine import step as optimizer_step
from roclip.errors import DataError, RoclipError, StoppedError, TrainingError
from roclip.leaving import Leaving
from roclip.loss import LOSSES
from roclip.metrics import MetricsWriter
from roclip.model import Towers
from roclip.schedule import Position
from roclip.shard_cache import shard_cache
from roclip.shards import Manifest, write_atomic
from roclip.stream import Batch, Snapshot, Stream, take_snapshot, wait_for_shards
from roclip.suspects import write_suspects
from roclip.truth import poisoned_samples

EpochEnd = Callable[[Towers, Cursor], None]


def train(config: Config, arm: str, run: Path, *, name: str = "", on_epoch_end: EpochEnd | None = None) -> Path:
    """Train one arm in a run directory, from where it stands to its last epoch.

    Args:
        arm: `clip` (undefended) or `roclip`.
        run: The run directory; the shards lie in it or where `data.shards` says.
        name: Folder of this training in the run directory; empty is `arm`.
        on_epoch_end: Called on all ranks with the towers (in evaluation mode) after each epoch, before its checkpoint
            is named; a resume repeats it only for epochs whose checkpoint was not complete.

    Returns:
        The last checkpoint's folder. A defended training leaves `suspects.parquet` beside the checkpoints.

    Raises:
        DataError: no shards came in time, or too many samples cannot be read.
        TrainingError: a loss is not finite.
        CheckpointError: the checkpoint to resume from was altered.
        StoppedError: SIGTERM came, and where training stood is saved.
    """
    with Leaving() as leaving:
        return _train(config, arm, run, name, on_epoch_end, leaving)


def _train(config: Config, arm: str, run: Path, name: str, on_epoch_end: EpochEnd | None, leaving: Leaving) -> Path:
    # ---- build ----------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    towers = Towers(config.model.name, model_file(config), options=config.model, loss=config.train.loss)
    engine = build_engine(towers, config.train)
    rank, world_size, device = distributed.rank(), distributed.world_size(), engine.device
    defence = Defence(config, towers, device, _ground_truth(run)) if arm == "roclip" else None
    parts = defence.parts if defence else {}
    manifest = Manifest(config.data.shards or run / "shards")
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
        workers=config.data.loader_workers,
        cache=shard_cache(config.data),
    )
    # ---- resume ---------------------------------------------------------------------------------------------
    folder = run / (name or arm) / "checkpoints"
    store = checkpoint_store(config.train.checkpoint_store, folder)
    bring(folder, store)
    cursor = checkpoint.resume(folder, engine, towers, parts) or Cursor(0, 1, 0, 0, "plain")
    writer = checkpoint.Writer(
        folder, keep=config.train.keep_checkpoints, keep_every_epochs=config.train.keep_every_epochs, store=store
    )
    metrics = MetricsWriter(folder.parent / "metrics.jsonl", cursor.step) if rank == 0 else None
    step, samples_seen, first_step = cursor.step, cursor.samples_seen, cursor.step_in_epoch
    first_epoch, phase, saved_at, skipped = cursor.epoch, cursor.phase, time.monotonic(), 0

    for epoch in range(first_epoch, config.train.epochs + 1):
        # ---- an epoch ---------------------------------------------------------------------------------------
        snapshot = _agree_on_snapshot(config, manifest, run, epoch)
        steps = stream.steps(snapshot)
        bad_samples, waited_s, logged_at, logged_step = 0, 0.0, time.monotonic(), step
        batches = stream.epoch(snapshot, epoch, first_step)
        towers.train()
        for step_in_epoch in range(first_step + 1, steps + 1):
            # ---- a step -------------------------------------------------------------------------------------
            asked_at = time.monotonic()
            batch = next(batches)
            waited_s += time.monotonic() - asked_at
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
            buffers = [buffer.clone() for buffer in towers.buffers()] if config.train.on_divergence == "skip" else []
            (image_features, text_features, logit_scale, *bias), backward = accumulate.forward(
                engine,
                pixels,
                (defended.tokens if defended else batch.tokens).to(device),
                pieces=config.train.grad_accum_steps,
                text_gradient=not defended or defended.kind != "matched",
            )
            lesson = Lesson(text_features, batch.valid.to(device))
            finite = _is_finite("features", image_features.sum() + text_features.sum(), step + 1, batch, config)
            if defended and finite:
                lesson = defended.lesson(image_features, text_features, lesson.keep)
            loss = LOSSES[config.train.loss](
                image_features,
                lesson.text_features,
                logit_scale,
                *bias,
                keep=lesson.keep,
                same_caption=lesson.learns_from if config.pool.duplicates == "mask" else None,
            )
            if finite and _is_finite("loss", loss, step + 1, batch, config):
                backward(loss)
                optimizer_step(engine, towers)
                if defended:
                    defended.remember(image_features, text_features.detach(), lesson)
            else:
                skipped += 1
                for buffer, before in zip(towers.buffers(), buffers, strict=True):
                    buffer.copy_(before)  # batch norm has seen the step
            step += 1
            samples_seen += config.train.global_batch_size
            # ---- say and save -------------------------------------------------------------------------------
            last = step_in_epoch == steps
            if last or step % config.train.log_every_steps == 0:
                values = {name: _mean(value) for name, value in {"loss": loss, **lesson.seen}.items()}
                elapsed_s = time.monotonic() - logged_at
                if metrics:
                    metrics.write(
                        {
                            "step": step,
                            "epoch": epoch,
                            "progress": epoch - 1 + step_in_epoch / steps,
                            "epochs": config.train.epochs,
                            "phase": phase,
                            "samples_seen": samples_seen,
                            "lr": lr,
                            "logit_scale": float(logit_scale.detach()),
                            "samples_per_s": (step - logged_step) * config.train.global_batch_size / elapsed_s,
                            "data_wait_frac": waited_s / elapsed_s,
                            "bad_samples": bad_samples,
                            "skipped_steps": skipped,
                            **({"pool_count": defence.pool.count} if defence else {}),
                            **values,
                        }
                    )
                waited_s, logged_at, logged_step = 0.0, time.monotonic(), step
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
    final = checkpoint.named(folder, "LATEST")
    if final is None:
        raise TrainingError(f"{folder}: expected a checkpoint after {config.train.epochs} epochs, got none.")
    return final


def learning_rate(config: Config, progress: float) -> float:
    """Linear warm-up, then cosine to zero, over epochs (so that it does not need the number of steps in advance)."""
    warmup, epochs = config.train.warmup_epochs, config.train.epochs
    if progress < warmup:
        return config.train.lr * progress / warmup
    return config.train.lr * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(epochs - warmup, 1e-9)))


def _agree_on_snapshot(config: Config, manifest: Manifest, run: Path, epoch: int) -> Snapshot:
    """Rank 0 decides which shards an epoch has and records it: a resume and the other arms see the same data."""
    names, problem = None, None
    if distributed.rank() == 0:
        path = run / "snapshots" / f"epoch-{epoch:05d}.json"
        try:
            if path.exists():
                names = json.loads(path.read_text())["shards"]
            else:
                wait_for_shards(manifest, config.data.min_shards, config.data.wait_s)
                snapshot = take_snapshot(manifest)
                names = snapshot.names
                record = {"epoch": epoch, "digest": snapshot.digest, "samples": snapshot.samples, "shards": names}
                write_atomic(path, json.dumps(record, indent=1))
        except RoclipError as error:
            problem = error
    names, problem = distributed.broadcast_object((names, problem))
    if problem is not None:
        raise problem
    return take_snapshot(manifest, names)


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
            "Delete the manifest record of that shard and run ingest again."
        )


def _is_finite(what: str, value: Tensor, step: int, batch: Batch, config: Config) -> bool:
    """Whether the step may be taken: the same answer on every rank. Raises `TrainingError` unless the config skips."""
    if torch.isfinite(distributed.all_sum(value)):
        return True
    told = (
        f"step {step}: {what} not finite (this rank: {value.item()}), before the update. Samples "
        f"{batch.ids[:3].tolist()} …."
    )
    if config.train.on_divergence == "skip":
        logging.getLogger(__name__).warning("%s The step is left out, as train.on_divergence says.", told)
        return False
    raise TrainingError(
        f"{told} Lower train.lr, set train.grad_clip_norm, or use train.precision=fp32; "
        "the same command resumes from the last checkpoint."
    )


def _ground_truth(run: Path) -> dict[int, str]:
    """What the attacker wants of each poisoned sample, where a run knows its poisons: for metrics only."""
    rows = poisoned_samples(run).to_pylist()
    return {row["id"]: f"{row['attack']}: {row['target_label']}" for row in rows}


def _mean(value: Tensor | float) -> float:
    if isinstance(value, Tensor):
        return float(distributed.all_sum(value.float())) / distributed.world_size()
    return value


def main(arguments: list[str]) -> int:
    """`torchrun -m roclip.train CONFIG [KEY=VALUE …]`: train every arm on the shards of the run, without Ray."""
    environment_defaults()
    if not arguments or arguments[0].startswith("-"):
        print(main.__doc__)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    try:
        config = load_config(arguments[0], arguments[1:])
        if "RANK" in os.environ:
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        run = distributed.broadcast_object(run_directory(config) if distributed.rank() == 0 else None)
        if distributed.rank() == 0:
            write_atomic(run / "config.yaml", dump_config(config))
        for arm in config.arms:
            final = train(config, arm, run)
            if distributed.rank() == 0:
                print(f"{arm}: {final}")
    except RoclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
