"""What a checkpoint can do, and what an attacker can make it do.

Letters: N images, D feature width, C classes.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from roclip.checkpoint import Cursor
from roclip.config import Config
from roclip.errors import DataError
from roclip.metrics import read_metrics
from roclip.model import Encoder, Towers
from roclip.shards import write_atomic


@dataclass(frozen=True)
class Rate:
    """A share with its count and its Wilson 95 % interval."""

    successes: int
    n: int
    rate: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out images with what is known of them; written beside the URL list before training."""

    images: list[np.ndarray]
    """N of (H, W, 3) uint8."""
    captions: list[str]
    labels: list[str]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    attacks: dict[str, "AttackSet"]


@dataclass(frozen=True)
class AttackSet:
    """Images on which an attack is tried, and the label that it wants for each of them."""

    images: list[np.ndarray]
    target_labels: list[str]


def load_evaluation_set(folder: Path) -> EvaluationSet:
    """Read `labels.json`, `eval.parquet` and, where there is one, `attack_eval.parquet` of a run's origin folder."""
    try:
        names = json.loads((folder / "labels.json").read_text())
        table = pq.read_table(folder / "eval.parquet").to_pydict()
    except OSError as error:
        raise DataError(
            f"{folder}: expected labels.json and eval.parquet, got {error}. Set evaluate.images to a parquet with "
            "image, caption and label, or run the whole pipeline with `roclip run`."
        ) from error
    attacks: dict[str, AttackSet] = {}
    if (folder / "attack_eval.parquet").exists():
        rows = pq.read_table(folder / "attack_eval.parquet").to_pydict()
        for name in sorted(set(rows["attack"])):
            chosen = [i for i, attack in enumerate(rows["attack"]) if attack == name]
            attacks[name] = AttackSet(
                [decode_any(rows["image"][i]) for i in chosen], [rows["target_label"][i] for i in chosen]
            )
    return EvaluationSet(
        images=[decode_any(image) for image in table["image"]],
        captions=table["caption"],
        labels=table["label"],
        classes=tuple(names["labels"]),
        templates=tuple(names["templates"]),
        attacks=attacks,
    )


def evaluate(encoder: Encoder, data: EvaluationSet) -> dict:
    """Zero-shot top-1, linear probe top-1, retrieval recall and attack success of one checkpoint.

    Returns:
        `zero_shot_top1`, `linear_probe_top1`, `recall_at_1`, `recall_at_5` as shares, `n`, and `attacks`: for each
        the `Rate` of images that are predicted as the attacker's label. Backdoor images are triggered test images of
        other classes; targeted images are the poisoned ones themselves.
    """
    image_features = encoder.images(data.images)
    classifier = encoder.classifier(data.classes, data.templates)
    predicted = (image_features @ classifier.T).argmax(dim=1)
    truth = torch.tensor([data.classes.index(label) for label in data.labels])
    attacks = {}
    for name, attack in data.attacks.items():
        answers = (encoder.images(attack.images) @ classifier.T).argmax(dim=1).tolist()
        hits = sum(data.classes[answer] == target for answer, target in zip(answers, attack.target_labels, strict=True))
        attacks[name] = asdict(rate(hits, len(answers)))
    return {
        "zero_shot_top1": (predicted == truth).float().mean().item(),
        "linear_probe_top1": linear_probe(image_features, truth),
        **recall(image_features, encoder.texts(data.captions), (1, 5)),
        "n": len(truth),
        "attacks": attacks,
    }


def record_evaluation(config: Config, run: Path, arm: str, towers: Towers, cursor: Cursor) -> None:
    """Evaluate at an epoch's end and keep it in `<arm>/evaluations.jsonl`; `evaluate.every` epochs, and the last.

    An epoch that is trained again after a crash replaces its own line. A run without held-out images (a URL list, and
    no `evaluate.images`) is not evaluated.
    """
    if not (run / "origin" / "labels.json").exists():
        return
    every, last = config.evaluate.every, cursor.epoch == config.train.epochs
    if not last and (not every or cursor.epoch % every):
        return
    row = {"epoch": cursor.epoch, "step": cursor.step, "phase": cursor.phase}
    row |= evaluate(Encoder(towers), load_evaluation_set(run / "origin"))
    path = run / arm / "evaluations.jsonl"
    kept = [line for line in read_metrics(path) if line["epoch"] < cursor.epoch]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in [*kept, row]))


def rate(successes: int, n: int) -> Rate:
    """successes / n with its Wilson score interval at 95 % (Wilson 1927)."""
    if n == 0:
        return Rate(0, 0, 0.0, (0.0, 1.0))
    z = 1.959964
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Rate(successes, n, p, (max(0.0, centre - half), min(1.0, centre + half)))


def recall(image_features: Tensor, text_features: Tensor, ranks: Sequence[int]) -> dict[str, float]:
    """Image-to-text and text-to-image recall at each rank, averaged over both ways.

    A query's own partner counts as found at rank k when fewer than k others are strictly nearer.
    """
    similarity = image_features @ text_features.T
    own = similarity.diagonal()
    nearer_text = (similarity > own[:, None]).sum(dim=1)
    nearer_image = (similarity > own[None, :]).sum(dim=0)
    return {
        f"recall_at_{k}": 0.5 * ((nearer_text < k).float().mean() + (nearer_image < k).float().mean()).item()
        for k in ranks
    }


def linear_probe(features: Tensor, truth: Tensor, l2: float = 1e-3) -> float:
    """Top-1 of a logistic regression on frozen features: trained on a random half of the rows, tested on the other.

    Args:
        features: (N, D), unit length.
        truth: (N,) class numbers.
    """
    train, test = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0)).chunk(2)
    classes = int(truth.max()) + 1
    weight = torch.zeros(features.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features[train] @ weight * 10 + bias, truth[train]) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    answers = (features[test] @ weight * 10 + bias).argmax(dim=1)
    return (answers == truth[test]).float().mean().item()


def decode_any(encoded: bytes) -> np.ndarray:
    """An encoded image of any size to (H, W, 3) uint8."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))
