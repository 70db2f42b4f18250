"""Evaluates a checkpoint: what it can do, and what an attacker can make it do.

Letters: N images, D feature width, C classes.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from roclip import distributed
from roclip.checkpoint.pointers import Cursor
from roclip.config import Config
from roclip.evaluation.figures import linear_probe, places, recall
from roclip.evaluation.rate import rate
from roclip.evaluation.sets import EvaluationSet, fill, load_evaluation_set
from roclip.metrics.registry import read_metrics
from roclip.model.towers import Encoder, Towers
from roclip.storage import write_atomic


def evaluate(encoder: Encoder, data: EvaluationSet) -> dict[str, Any]:
    """Zero-shot accuracy, linear probe, retrieval recall and attack success of one checkpoint.

    Returns:
        With labels `zero_shot_top1`, `zero_shot_top5` and `linear_probe_top1`; with captions what `recall` gives; all
        as shares. `n`, and `attacks`: for each the `Rate` of images that are predicted as the attacker's label.
        Backdoor images are triggered test images of other classes; targeted images are the poisoned ones themselves.
        A backdoor's `clean` is the `Rate` of held-out images of other classes, without a trigger, that are predicted as
        its label too: the success that remains when the trigger does nothing.
    """
    image_features = encoder.images(data.images)
    figures: dict[str, Any] = {}
    classes = list(data.classes)
    classifier = class_weights(encoder, data.classes, data.templates) if classes else None
    called: list[tuple[str, str]] = []
    if data.labels and classifier is not None:
        truth = torch.tensor([classes.index(label) for label in data.labels])
        scores = image_features @ classifier.T
        called = [
            (classes[answer], label) for answer, label in zip(scores.argmax(1).tolist(), data.labels, strict=True)
        ]
        place = places(scores, F.one_hot(truth, len(classes)).bool())
        figures["zero_shot_top1"] = (place < 1).float().mean().item()
        figures["zero_shot_top5"] = (place < 5).float().mean().item()
        figures["linear_probe_top1"] = linear_probe(image_features, truth, data.digests)
    if data.captions:
        texts = {caption: None for captions in data.captions for caption in captions}
        number = {caption: i for i, caption in enumerate(texts)}  # equal captions are one text, that of several images
        pairs = [(i, number[caption]) for i, captions in enumerate(data.captions) for caption in captions]
        figures |= recall(image_features, encoder.texts(list(texts)), torch.tensor(pairs))
    attacks: dict[str, Any] = {}
    for name, attack in data.attacks.items():
        if classifier is None:
            continue
        answers = (encoder.images(attack.images) @ classifier.T).argmax(dim=1).tolist()
        hits = sum(classes[answer] == target for answer, target in zip(answers, attack.target_labels, strict=True))
        attacks[name] = asdict(rate(hits, len(answers)))
        if name != "targeted" and data.labels and len(target := set(attack.target_labels)) == 1:
            others = [answer in target for answer, label in called if label not in target]
            attacks[name]["clean"] = asdict(rate(sum(others), len(others)))
    return {**figures, "n": len(data.images), "attacks": attacks}


def class_weights(encoder: Encoder, classes: Mapping[str, Sequence[str]], templates: Sequence[str]) -> Tensor:
    """Zero-shot weights (C, D): for each class the normalised mean over its names in all templates.

    Prompt ensembling of CLIP (arXiv:2103.00020, section 3.1.4), over several names of a class too.
    """
    prompts = [fill(template, name) for names in classes.values() for name in names for template in templates]
    counts = torch.tensor([len(names) * len(templates) for names in classes.values()])
    features = encoder.texts(prompts)
    owner = torch.repeat_interleave(torch.arange(len(classes)), counts)
    return F.normalize(torch.zeros(len(classes), features.shape[1]).index_add_(0, owner, features), dim=-1)


class SharedEncoder(Encoder):
    """An `Encoder` whose work all ranks share: each encodes a contiguous part, and every rank gets all features.

    All ranks call it with the same images or captions. The parts are of one size, so that no rank waits for another.
    """

    def images(self, images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        return self._share(super().images, images)

    def texts(self, captions: Sequence[str]) -> Tensor:
        return self._share(super().texts, captions)

    def _share(self, encode: Callable[[Any], Tensor], items: Any) -> Tensor:
        ranks, size = distributed.world_size(), len(items)
        if ranks == 1 or not size:
            return encode(items)
        part = math.ceil(size / ranks)
        starts = [min(rank * part, size - part) for rank in range(ranks)]  # the last parts overlap: all are of one size
        mine = starts[distributed.rank()]
        own = encode(items[mine : mine + part])
        parts = distributed.gather(own.to(self.towers.mean.device)).cpu().split(part)
        return torch.cat([rows[rank * part - starts[rank] :] for rank, rows in enumerate(parts)])


def record_evaluation(config: Config, run: Path, arm: str, towers: Towers, cursor: Cursor) -> None:
    """Evaluate at an epoch's end and record the figures in `<arm>/evaluations.jsonl`. Call it on all ranks.

    It is due `evaluate.every` epochs after the last evaluation of the same phase, so that ends of matched and of plain
    periods are both seen, and at the last epoch. An epoch that is trained again after a crash replaces its own line.
    A run without held-out images (a URL list, no `evaluate.images` and no `evaluate.webdataset`) is not evaluated.
    """
    path = run / arm / "evaluations.jsonl"
    kept = [line for line in read_metrics(path) if line["epoch"] < cursor.epoch]
    known = bool(config.evaluate.webdataset) or (run / "origin" / "labels.json").exists()
    if not distributed.broadcast_object(known and _due(config, kept, cursor)):
        return
    # Every rank computes all figures from the same features: none waits for another one's linear probe.
    figures = evaluate(SharedEncoder(towers.whole()), load_evaluation_set(config, run / "origin"))
    if distributed.rank() == 0:
        row = {"epoch": cursor.epoch, "step": cursor.step, "phase": cursor.phase, **figures}
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in [*kept, row]))


def _due(config: Config, evaluated: Sequence[Mapping[str, Any]], cursor: Cursor) -> bool:
    if cursor.epoch == config.train.epochs:
        return True
    last = max((row["epoch"] for row in evaluated if row["phase"] == cursor.phase), default=0)
    return bool(config.evaluate.every) and cursor.epoch - last >= config.evaluate.every
