"""A small segmentation network, trained on trusted images with masks only.

Letters: N images, C labels, H and W height and width in pixels, S side of the network's input.
"""

import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from roclip.config import OracleConfig
from roclip.errors import CheckpointError, DataError
from roclip.metrics.registry import Progress
from roclip.model.towers import device_at_hand
from roclip.oracle.segmenters.base import LabelCalibration, Segmenter, calibrate, decode_masked, mean_iou
from roclip.oracle.segmenters.mask_sets import MaskSet, read_parquet
from roclip.storage import sha256_file, write_atomic

WEIGHTS = "segmenter.safetensors"
CARD = "segmenter.json"
SCHEMA = 1
MAX_SIDE_PX = 96
"""Largest side of the network's input: enough to tell objects apart, cheap on a CPU."""
_LICENCE = "that of the images and masks that it was trained on"


class TrainedSegmenter(Segmenter):
    """A segmentation network trained by `train_segmenter`, with its calibration."""

    def __init__(self, net: nn.Module, labels: Sequence[str], size_px: int, batch_size: int = 128):
        self.device = device_at_hand()
        self.net, self.labels = net.to(self.device).eval(), tuple(labels)
        self.size_px, self.batch_size = size_px, batch_size
        self.calibration: dict[str, LabelCalibration] = {}
        self.info: dict[str, Any] = {}

    @torch.inference_mode()
    def maps(self, images: np.ndarray) -> Iterator[Tensor]:
        for start in range(0, len(images), self.batch_size):
            batch = np.ascontiguousarray(images[start : start + self.batch_size])
            pixels = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).float().div(255)
            if pixels.shape[-2:] != (self.size_px, self.size_px):
                pixels = F.interpolate(pixels, self.size_px, mode="bilinear", antialias=True, align_corners=False)
            yield self.net(pixels).float().softmax(dim=1).cpu()

    def save(self, folder: Path) -> None:
        """Write the weights, then the card that holds their sha256; a reader sees both or neither."""
        state = {key: value.detach().contiguous().cpu() for key, value in self.net.state_dict().items()}
        write_atomic(folder / WEIGHTS, save(state))
        self.info["sha256"] = sha256_file(folder / WEIGHTS)
        card = {
            "schema": SCHEMA,
            "labels": list(self.labels),
            "size_px": self.size_px,
            "calibration": {label: asdict(values) for label, values in self.calibration.items()},
            "info": self.info,
        }
        write_atomic(folder / CARD, json.dumps(card, indent=1))

    @classmethod
    def load(cls, folder: Path) -> "TrainedSegmenter":
        """Load a segmenter that `save` wrote. Raises `CheckpointError` if it is missing, altered or of another kind."""
        try:
            card = json.loads((folder / CARD).read_text())
            weights = (folder / WEIGHTS).read_bytes()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: expected {CARD} and {WEIGHTS}, got {error}. Name a folder that `roclip train-segmenter` "
                "wrote, or leave oracle.weights empty to train one."
            ) from error
        if card.get("schema") != SCHEMA:
            raise CheckpointError(
                f"{folder / CARD}: expected schema {SCHEMA}, got {card.get('schema')!r}. Delete it and train again."
            )
        if sha256_file(folder / WEIGHTS) != card["info"]["sha256"]:
            raise CheckpointError(
                f"{folder / WEIGHTS}: altered since it was trained (its sha256 is not the one in {CARD}). "
                "Restore the file, or delete the folder and train again."
            )
        net = build_net(1 + len(card["labels"]))
        net.load_state_dict(load(weights))
        segmenter = cls(net, card["labels"], card["size_px"])
        segmenter.calibration = {label: LabelCalibration(**row) for label, row in card["calibration"].items()}
        segmenter.info = {"licence": _LICENCE, "independent_of_clip": True, "calibrated": True, **card["info"]}
        return segmenter


def build_net(classes: int) -> nn.Module:
    """Build a narrow feature pyramid network with random weights (segmentation_models_pytorch).

    Input sides are multiples of 32; logits come at half the resolution. On a CPU a U-Net spends most of its time in the
    last, full-resolution block, which these masks do not need.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import segmentation_models_pytorch as smp

        encoder: dict[str, Any] = {
            "layers": (1, 1, 1, 1),
            "channels": (32, 64, 128, 192),
            "stem_type": "deep",
            "stem_width": 16,
        }
        return smp.FPN(
            "tu-resnet18",
            encoder_weights=None,
            decoder_pyramid_channels=48,
            decoder_segmentation_channels=32,
            decoder_dropout=0.0,
            classes=classes,
            upsampling=2,
            **encoder,
        )


def train_segmenter(
    trusted: Path,
    labels: Sequence[str],
    config: OracleConfig,
    seed: int,
    out: Path,
    on_progress: Progress | None = None,
) -> TrainedSegmenter:
    """`train_on` a parquet with the columns image (encoded) and mask (PNG of class indices, 0 background)."""
    return train_on(read_parquet(trusted, labels), config, seed, out, on_progress)


def train_on(
    source: MaskSet,
    config: OracleConfig,
    seed: int,
    out: Path,
    on_progress: Progress | None = None,
    licence: str = "",
) -> TrainedSegmenter:
    """Train on trusted images, calibrate on the held-out share, save to `out` and return the segmenter.

    Half of the training images get a random sticker labelled background, so that a trigger does not mislead the oracle. On a
    CPU the same seed and number of threads on one machine give the same weights. A segmenter in `out` that was trained on the
    same source, labels, epochs and seed is returned without training.

    Raises `DataError` if there are too few images or a mask holds an unknown class.
    """
    started = time.monotonic()
    progress = on_progress or (lambda done, total, text: None)
    if before := trained_before(out, source.sha256, source.labels, config, seed):
        progress(1, 1, f"segmenter: {out} was trained on these masks before{_summary(before)}")
        return before
    labels = source.labels
    rows = np.random.default_rng((seed, 61)).permutation(len(source.images))
    held_out, train = np.split(rows, [round(config.reference_frac * len(rows))])
    if len(train) < 32 or len(held_out) < 8:
        raise DataError(
            f"{source.name}: expected at least 32 images to train the oracle on and 8 to calibrate it, got {len(train)} "
            f"and {len(held_out)}. Raise oracle.trusted or set oracle.reference_frac."
        )
    images, masks = decode_masked(source.images, source.masks, labels, MAX_SIDE_PX, source.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build_net(1 + len(labels)).to(device_at_hand())
    _fit(net, images[train], masks[train], config.epochs, seed, progress)
    segmenter = TrainedSegmenter(net, labels, images.shape[1])
    segmenter.calibration = calibrate(segmenter, images[held_out], masks[held_out])
    segmenter.info = {
        "name": "feature pyramid network",
        "provenance": f"trained from random weights on {len(train)} trusted images with masks, on no crawled image",
        "licence": licence or _LICENCE,
        "independent_of_clip": True,
        "calibrated": True,
        "trusted_sha256": source.sha256,
        "reference_rows": sorted(source.rows[row] for row in held_out),
        "mean_iou": round(mean_iou(segmenter.masks(images[held_out]), masks[held_out], len(labels)), 4),
        "parameters": sum(p.numel() for p in net.parameters()),
        "epochs": config.epochs,
        "seed": seed,
        "train_s": round(time.monotonic() - started, 1),
    }
    segmenter.save(out)
    progress(config.epochs, config.epochs, f"segmenter: trained{_summary(segmenter)}")
    return segmenter


def trained_before(
    folder: Path, trusted_sha256: str, labels: Sequence[str], config: OracleConfig, seed: int
) -> TrainedSegmenter | None:
    """Return the segmenter in a folder if it was trained on this set, labels and settings, else None."""
    if not (folder / CARD).exists():
        return None
    segmenter = TrainedSegmenter.load(folder)
    made_for = [segmenter.info.get(name) for name in ("trusted_sha256", "epochs", "seed")]
    same = segmenter.labels == tuple(labels) and made_for == [trusted_sha256, config.epochs, seed]
    return segmenter if same else None


def _summary(segmenter: TrainedSegmenter) -> str:
    covered = sum(map(segmenter.covers, segmenter.labels))
    return f", mean IoU {segmenter.info['mean_iou']:.2f}, {covered} of {len(segmenter.labels)} labels covered"


_BATCH, _LR, _BACKGROUND_WEIGHT = 16, 4e-3, 0.3


def _fit(net: nn.Module, images: np.ndarray, masks: np.ndarray, epochs: int, seed: int, progress: Progress) -> None:
    generator = np.random.default_rng((seed, 62))
    batch = min(_BATCH, len(images))
    steps = len(images) // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=_LR, weight_decay=1e-2)
    all_steps = epochs * steps + 1
    warmup = max(0.2, 2 / all_steps)  # torch divides by the number of warm-up steps minus one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=all_steps, pct_start=warmup)
    net.train()
    device = next(net.parameters()).device
    for epoch in range(1, epochs + 1):
        order, total = generator.permutation(len(images)), 0.0
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            pixels, target = _augment(images[rows], masks[rows], generator)
            loss = _loss(net(pixels.to(device)), target.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        progress(epoch, epochs, f"segmenter: epoch {epoch} of {epochs}, loss {total / steps:.3f}")
    net.eval()


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with a down-weighted background, plus one minus the mean Dice score, which weighs small objects equally."""
    stride = target.shape[-1] // logits.shape[-1]
    target = target[:, stride // 2 :: stride, stride // 2 :: stride]
    weight = torch.ones(logits.shape[1], device=logits.device)
    weight[0] = _BACKGROUND_WEIGHT
    p, q = logits.softmax(dim=1), F.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2).float()
    both, sum_ = (p * q).sum(dim=(0, 2, 3)), (p + q).sum(dim=(0, 2, 3))
    return F.cross_entropy(logits, target, weight=weight) + 1 - ((2 * both + 1) / (sum_ + 1)).mean()


def _augment(images: np.ndarray, masks: np.ndarray, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mirror, shift the brightness, and put stickers on half of a batch; pixels in [0, 1] and class indices."""
    images, masks = images.copy(), masks.copy()
    side = images.shape[1]
    for image, mask in zip(images, masks, strict=True):
        if generator.random() < 0.5:
            image[:], mask[:] = image[:, ::-1].copy(), mask[:, ::-1].copy()
        if generator.random() < 0.5:
            size = int(generator.integers(max(2, side // 16), side // 4 + 1))
            top, left = (int(v) for v in generator.integers(0, side - size + 1, 2))
            image[top : top + size, left : left + size] = _sticker(size, generator)
            mask[top : top + size, left : left + size] = 0
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
    gain = torch.from_numpy(generator.uniform(0.8, 1.2, (len(images), 1, 1, 1))).float()
    return (pixels * gain).clamp(0, 1), torch.from_numpy(masks).long()


def _sticker(size: int, generator: np.random.Generator) -> np.ndarray:
    """(size, size, 3) uint8: random cells, from one flat colour to noise."""
    cells = int(generator.integers(1, size + 1))
    colors = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    if generator.random() < 0.5:
        colors = (colors > 127).astype(np.uint8) * 255
    index = np.arange(size) * cells // size
    return colors[np.ix_(index, index)]
