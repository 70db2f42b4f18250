"""What an image shows, and where: a small segmentation network, trained on trusted images with masks only.

It shares nothing with the model that it judges: other weights, other data, another kind of label. What it cannot see
well enough on held-out trusted images it says so about: such a label is unchecked, it never counts as agreement.

Letters: N images, C labels, H and W height and width in pixels, S side of the network's input.
"""

import io
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

from roclip.config import OracleConfig
from roclip.errors import CheckpointError, DataError
from roclip.metrics import Progress
from roclip.reader import decode
from roclip.shards import sha256_file, write_atomic

WEIGHTS = "segmenter.safetensors"
CARD = "segmenter.json"
SCHEMA = 1
MAX_SIDE_PX = 96
"""Largest side of the network's input: enough to tell objects apart, cheap on a CPU."""
MIN_AREA = 0.005
"""An object under this share of the image is not expected to be seen."""
SEEN_RECALL, CLEAR_PRECISION = 0.95, 0.9
"""What the two thresholds of a label are set for, on held-out trusted images."""
MIN_RECALL, MIN_SPECIFICITY, MIN_EXAMPLES = 0.9, 0.6, 10
"""A label with less is unchecked."""


@dataclass(frozen=True)
class LabelCalibration:
    """How well the oracle sees one label on held-out trusted images."""

    seen: float
    """Area share from which on the label may be there: `recall` of the images that show it reach this."""
    clear: float
    """Area share from which on it certainly is: `precision` of the images that reach this show it."""
    recall: float
    specificity: float
    """Share of the images without the label that stay under `seen`."""
    precision: float
    clear_recall: float
    examples: int
    """Held-out images that show the label."""
    covered: bool


class Segmenter(Protocol):
    """An oracle. `segment` and `masks` are pure functions of the images."""

    labels: tuple[str, ...]
    calibration: dict[str, LabelCalibration]
    info: dict[str, Any]
    """name, provenance, sha256; may hold trusted_sha256 and reference_rows (rows of it that were held out)."""

    def segment(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 to (N, C): the share of the image's area that each label covers."""
        ...

    def masks(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 to (N, H, W) uint8: 0 background, 1 + labels.index(label) an object."""
        ...

    def covers(self, label: str) -> bool:
        """Whether the oracle sees this label well enough to contradict anybody about it."""
        ...


class TrainedSegmenter:
    """The network of `train_segmenter` with its calibration; implements `Segmenter`."""

    def __init__(self, net: nn.Module, labels: Sequence[str], size_px: int, batch_size: int = 128):
        self.net, self.labels, self.size_px, self.batch_size = net.eval(), tuple(labels), size_px, batch_size
        self.calibration: dict[str, LabelCalibration] = {}
        self.info: dict[str, Any] = {}

    def covers(self, label: str) -> bool:
        return label in self.calibration and self.calibration[label].covered

    def segment(self, images: np.ndarray) -> np.ndarray:
        """The mean over the pixels of each label's probability; see `Segmenter`."""
        shares = [p[:, 1:].mean(dim=(2, 3)) for p in self._probabilities(images)]
        return torch.cat(shares).numpy() if shares else np.empty((0, len(self.labels)), dtype=np.float32)

    def masks(self, images: np.ndarray) -> np.ndarray:
        size = images.shape[1:3]
        maps = [
            F.interpolate(p, size=size, mode="bilinear", align_corners=False).argmax(dim=1).to(torch.uint8)
            for p in self._probabilities(images)
        ]
        return torch.cat(maps).numpy() if maps else np.empty((0, *size), dtype=np.uint8)

    @torch.inference_mode()
    def _probabilities(self, images: np.ndarray):
        for start in range(0, len(images), self.batch_size):
            batch = np.ascontiguousarray(images[start : start + self.batch_size])
            pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).float().div(255)
            if pixels.shape[-2:] != (self.size_px, self.size_px):
                pixels = F.interpolate(pixels, self.size_px, mode="bilinear", antialias=True, align_corners=False)
            yield self.net(pixels).float().softmax(dim=1)

    def save(self, folder: Path) -> None:
        """Write weights, then the card that names their sha256; a reader sees both or neither."""
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
        """The segmenter that `save` wrote. Raises `CheckpointError` if it is missing, altered or of another kind."""
        try:
            card = json.loads((folder / CARD).read_text())
            weights = (folder / WEIGHTS).read_bytes()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: expected {CARD} and {WEIGHTS}, got {error}. Name a folder that train_segmenter wrote, "
                "or leave oracle.weights empty to train one."
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
        segmenter.info = card["info"]
        return segmenter


def build_net(classes: int) -> nn.Module:
    """A narrow feature pyramid network with random weights (segmentation_models_pytorch).

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
    """Train on the trusted images, calibrate on the share of them that is held out, save to `out` and return it.

    `trusted` is a parquet with the columns image (encoded) and mask (PNG of class indices, 0 background). Half of the
    training images get a sticker, labelled background, so that a trigger does not derail the oracle. The same seed and
    number of threads on the same machine give the same weights.

    Raises `DataError` when there are too few images or a mask names a class that is not there.
    """
    started = time.monotonic()
    say = on_progress or (lambda done, total, text: None)
    images, masks = read_trusted(trusted, labels, MAX_SIDE_PX)
    rows = np.random.default_rng((seed, 61)).permutation(len(images))
    held_out, train = np.split(rows, [round(config.reference_frac * len(rows))])
    if len(train) < 32 or len(held_out) < 8:
        raise DataError(
            f"{trusted}: expected at least 32 images to train the oracle on and 8 to calibrate it, got {len(train)} "
            f"and {len(held_out)}. Raise oracle.trusted or set oracle.reference_frac."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build_net(1 + len(labels))
    _fit(net, images[train], masks[train], config.epochs, seed, say)
    segmenter = TrainedSegmenter(net, labels, images.shape[1])
    segmenter.calibration = calibrate(segmenter, images[held_out], masks[held_out])
    iou = mean_iou(segmenter.masks(images[held_out]), masks[held_out], len(labels))
    segmenter.info = {
        "name": "feature pyramid network",
        "provenance": f"trained from random weights on {len(train)} trusted images with masks, on no crawled image",
        "trusted_sha256": sha256_file(trusted),
        "reference_rows": sorted(int(row) for row in held_out),
        "mean_iou": round(iou, 4),
        "parameters": sum(p.numel() for p in net.parameters()),
        "epochs": config.epochs,
        "seed": seed,
        "train_s": round(time.monotonic() - started, 1),
    }
    segmenter.save(out)
    covered = sum(segmenter.covers(label) for label in labels)
    say(config.epochs, config.epochs, f"segmenter: mean IoU {iou:.2f}, {covered} of {len(labels)} labels covered")
    return segmenter


def read_trusted(trusted: Path, labels: Sequence[str], max_side_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, S, S, 3) uint8 and masks (N, S, S) uint8 of trusted.parquet.

    S is the side of the first image, rounded down to a multiple of 32, and at most `max_side_px`.
    """
    try:
        table = pq.read_table(trusted, columns=["image", "mask"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{trusted}: expected a parquet with columns image and mask, got {error}.") from error
    if not len(table):
        raise DataError(f"{trusted}: expected trusted images, got none. Raise oracle.trusted.")
    with Image.open(io.BytesIO(table["image"][0].as_py())) as first:
        size = max(32, min(max_side_px, max(first.size)) // 32 * 32)
    images = np.stack([decode(encoded, size) for encoded in table["image"].to_pylist()])
    masks = np.stack([_mask(encoded, size) for encoded in table["mask"].to_pylist()])
    if masks.max() > len(labels):
        raise DataError(
            f"{trusted}: expected mask values 0 to {len(labels)} (background and {len(labels)} labels), got "
            f"{masks.max()}. Were the masks written for another list of labels?"
        )
    return images, masks


def _mask(encoded: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as mask:
        return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST), dtype=np.uint8)


def shown(masks: np.ndarray, classes: int) -> np.ndarray:
    """(N, H, W) class indices to (N, C) bool: which labels cover at least `MIN_AREA` of an image."""
    flat = masks.reshape(len(masks), -1)
    return np.stack([(flat == 1 + c).mean(axis=1) >= MIN_AREA for c in range(classes)], axis=1)


def calibrate(segmenter: TrainedSegmenter, images: np.ndarray, masks: np.ndarray) -> dict[str, LabelCalibration]:
    """Set both thresholds of every label on held-out trusted images and measure what they are worth."""
    areas, truth = segmenter.segment(images), shown(masks, len(segmenter.labels))
    return {label: _calibrate(areas[:, c], truth[:, c]) for c, label in enumerate(segmenter.labels)}


def _calibrate(areas: np.ndarray, truth: np.ndarray) -> LabelCalibration:
    there, not_there = areas[truth], areas[~truth]
    if not len(there) or not len(not_there):
        return LabelCalibration(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, len(there), False)
    seen = float(np.quantile(there, 1 - SEEN_RECALL, method="lower"))
    candidates = np.sort(areas)[::-1]
    hits = np.cumsum(truth[np.argsort(-areas, kind="stable")]) / np.arange(1, len(areas) + 1)
    precise = np.flatnonzero(hits >= CLEAR_PRECISION)
    at = int(precise[-1]) if len(precise) else 0
    clear = max(float(candidates[at]), seen)
    recall, specificity = float((there >= seen).mean()), float((not_there < seen).mean())
    covered = recall >= MIN_RECALL and specificity >= MIN_SPECIFICITY and len(there) >= MIN_EXAMPLES
    return LabelCalibration(
        seen=seen,
        clear=clear,
        recall=recall,
        specificity=specificity,
        precision=float(truth[areas >= clear].mean()) if (areas >= clear).any() else 0.0,
        clear_recall=float((there >= clear).mean()),
        examples=len(there),
        covered=bool(covered),
    )


def mean_iou(predicted: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Intersection over union, averaged over background and all labels that occur."""
    scores = [
        ((predicted == c) & (truth == c)).sum() / max(1, ((predicted == c) | (truth == c)).sum())
        for c in range(classes + 1)
        if (truth == c).any()
    ]
    return float(np.mean(scores))


_BATCH, _LR, _BACKGROUND_WEIGHT = 16, 4e-3, 0.3


def _fit(net: nn.Module, images: np.ndarray, masks: np.ndarray, epochs: int, seed: int, say: Progress) -> None:
    generator = np.random.default_rng((seed, 62))
    batch = min(_BATCH, len(images))
    steps = len(images) // batch
    optimizer = torch.optim.AdamW(net.parameters(), lr=_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=epochs * steps + 1, pct_start=0.2)
    net.train()
    for epoch in range(1, epochs + 1):
        order, total = generator.permutation(len(images)), 0.0
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            pixels, target = _augment(images[rows], masks[rows], generator)
            loss = _loss(net(pixels), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        say(epoch, epochs, f"segmenter: epoch {epoch} of {epochs}, loss {total / steps:.3f}")
    net.eval()


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with a light background, plus one minus the mean Dice score, which small objects count in."""
    stride = target.shape[-1] // logits.shape[-1]
    target = target[:, stride // 2 :: stride, stride // 2 :: stride]
    weight = torch.ones(logits.shape[1])
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
