"""The training loop: plain CLIP, or RoCLIP with its caption pool. Read this file first.

An epoch is matched or plain. In a plain epoch each image learns with its own caption, and the gate may leave out pairs
that disagree with the pool. In a matched epoch each image learns with the nearest caption of the pool.

Runs under Ray Train (`cluster/train_job.py`), under `torchrun -m roclip.train CONFIG`, or alone.
Letters: B local batch, G global batch, D feature width, L caption tokens.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from roclip import checkpoint, distributed
from roclip.augment import augment
from roclip.checkpoint import Cursor
from roclip.config import Config, PoolConfig, dump_config, environment_defaults, load_config, model_file, run_directory
from roclip.engine import build_engine, clamp_logit_scale, set_lr
from roclip.errors import DataError, RoclipError, TrainingError
from roclip.gate import AgreementGate
from roclip.loss import clip_loss
from roclip.metrics import MetricsWriter
from roclip.model import Towers
from roclip.pool import CaptionPool
from roclip.shards import Manifest, write_atomic
from roclip.stream import Batch, Snapshot, Stream, take_snapshot, wait_for_shards

EpochEnd = Callable[[Towers, Cursor], None]


def train(config: Config, arm: str, run: Path, *, on_epoch_end: EpochEnd | None = None) -> Path:
    """Train one arm in a run directory, from where it stands to its last epoch.

    Args:
        arm: `clip` (undefended) or `roclip`.
        run: The run directory; the shards lie in it or where `data.shards` says.
        on_epoch_end: Called on rank 0 with the towers (in evaluation mode) after each epoch, before its checkpoint is
            named; a resume repeats it only for epochs whose checkpoint was not complete.

    Returns:
        The last checkpoint's folder.

    Raises:
        DataError: no shards came in time, or too many samples cannot be read.
        TrainingError: a loss is not finite.
        CheckpointError: the checkpoint to resume from was altered.
    """
    # ---- build ----------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    towers = Towers(config.model.name, model_file(config))
    engine = build_engine(towers, config.train)
    rank, world_size, device = distributed.rank(), distributed.world_size(), engine.device
    width = towers.cfg["embed_dim"]
    pool = gate = None
    if arm == "roclip":
        pool = CaptionPool(config.pool.size, width, backend=config.pool.backend, device=device)
        gate = AgreementGate(config.pool.gate_memory)
    parts = {"pool": pool, "gate": gate} if pool and gate else {}
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
    )
    # ---- resume ---------------------------------------------------------------------------------------------
    folder = run / arm / "checkpoints"
    cursor = checkpoint.resume(folder, engine, parts) or Cursor(0, 1, 0, 0, "plain")
    metrics = MetricsWriter(run / arm / "metrics.jsonl", cursor.step) if rank == 0 else None
    step, samples_seen, first_step = cursor.step, cursor.samples_seen, cursor.step_in_epoch
    first_epoch, phase = cursor.epoch, cursor.phase

    for epoch in range(first_epoch, config.train.epochs + 1):
        # ---- an epoch ---------------------------------------------------------------------------------------
        snapshot = _agree_on_snapshot(config, manifest, run, epoch)
        steps = stream.steps(snapshot)
        phase = phase_of(epoch, config.pool) if pool else "plain"
        bad_samples, waited_s, logged_at, logged_step = 0, 0.0, time.monotonic(), step
        batches = stream.epoch(snapshot, epoch, first_step)
        towers.train()
        for step_in_epoch in range(first_step + 1, steps + 1):
            # ---- a step -------------------------------------------------------------------------------------
            asked_at = time.monotonic()
            batch = next(batches)
            waited_s += time.monotonic() - asked_at
            bad_samples = _count_bad(batch, bad_samples, step_in_epoch, snapshot, config)
            lr = learning_rate(config, epoch - 1 + step_in_epoch / steps)
            set_lr(engine, lr)
            ids, keep = batch.ids.to(device), batch.valid.to(device)
            pixels = batch.images.to(device).float().div(255)
            pixels = augment(pixels, batch.ids, config.augment, seed=config.seed, epoch=epoch, size=towers.image_size)
            matched = phase == "matched"
            image_features, text_features, logit_scale = engine(
                pixels, batch.tokens.to(device), text_gradient=not matched
            )
            seen: dict[str, Tensor | float] = {}
            targets, same_caption = text_features, None
            if pool and matched:
                targets, similarity, slots = pool.nearest(image_features)
                same_caption = slots if config.pool.duplicates == "mask" else None
                seen["pool_similarity"] = similarity.mean()
                seen["pool_duplicates"] = _duplicates(distributed.gather(slots))
            elif pool and gate and any(config.pool.gate_frac) and pool.full:
                agreement = pool.agreement(image_features, text_features)
                keep = gate.keep(agreement, ids, keep, gate_share(config, epoch - 1 + step_in_epoch / steps))
                seen["agreement"] = agreement.mean()
                seen["gated"] = float(distributed.all_sum((~keep).sum()))
            loss = clip_loss(image_features, targets, logit_scale, keep, same_caption)
            _check_finite(loss, step + 1, batch)
            engine.backward(loss)
            engine.step()
            clamp_logit_scale(towers)
            if pool and (matched or config.pool.update == "always"):
                pool.enqueue(text_features.detach(), ids)
            step += 1
            samples_seen += config.train.global_batch_size
            # ---- say and save -------------------------------------------------------------------------------
            last = step_in_epoch == steps
            if last or step % config.train.log_every_steps == 0:
                values = {name: _mean(value) for name, value in {"loss": loss, **seen}.items()}
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
                            **({"pool_count": pool.count} if pool else {}),
                            **values,
                        }
                    )
                waited_s, logged_at, logged_step = 0.0, time.monotonic(), step
            if last or step % config.train.checkpoint_every_steps == 0:
                distributed.mean_buffers(towers)
                done = Cursor(step, epoch + 1 if last else epoch, 0 if last else step_in_epoch, samples_seen, phase)
                if last and on_epoch_end and rank == 0:
                    towers.eval()
                    on_epoch_end(towers, Cursor(step, epoch, step_in_epoch, samples_seen, phase))
                    towers.train()
                checkpoint.save(folder, engine, towers, parts, done, keep=config.train.keep_checkpoints)
        first_step = 0
    final = checkpoint.named(folder, "LATEST")
    if final is None:
        raise TrainingError(f"{folder}: expected a checkpoint after {config.train.epochs} epochs, got none.")
    return final


def phase_of(epoch: int, pool: PoolConfig) -> str:
    """'matched' for every K-th epoch, counted from 1, after the warm-up; else 'plain'."""
    return "matched" if pool.match_every and epoch > pool.warmup_epochs and epoch % pool.match_every == 0 else "plain"


def gate_share(config: Config, progress: float) -> float:
    """Share of a plain global batch that the gate leaves out after so many epochs."""
    start, end = config.pool.gate_frac
    return start + (end - start) * progress / config.train.epochs


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


def _count_bad(batch: Batch, bad: int, step_in_epoch: int, snapshot: Snapshot, config: Config) -> int:
    bad += int(distributed.all_sum((~batch.valid).sum()))
    limit = config.data.max_bad_frac * snapshot.samples
    if bad > limit:
        named = "; ".join(f"{name}: {reason}" for name, reason in batch.bad[:5]) or "on another rank"
        raise DataError(
            f"{bad} samples of this epoch cannot be read after {step_in_epoch} steps, more than data.max_bad_frac = "
            f"{config.data.max_bad_frac} of {snapshot.samples}. The last: {named}. "
            "Delete the manifest record of that shard and run ingest again."
        )
    return bad


def _check_finite(loss: Tensor, step: int, batch: Batch) -> None:
    if not torch.isfinite(distributed.all_sum(loss)):
        raise TrainingError(
            f"step {step}: the loss is not finite (this rank: {loss.item()}), before the update. Samples "
            f"{batch.ids[:3].tolist()} …. Lower train.lr, set train.grad_clip_norm, or use train.precision=fp32; "
            "the same command resumes from the last checkpoint."
        )


def _duplicates(slots: Tensor) -> float:
    return 1 - len(slots.unique()) / len(slots)


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
