"""torchvision's semantic and instance segmentation networks as oracles, with weights from a local file.

Letters: n images of a batch, K classes without background, h and w height and width of the maps.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from roclip.errors import CheckpointError, ConfigError
from roclip.model.safe_load import read_weights
from roclip.model.towers import device_at_hand
from roclip.oracle.segmenters.base import UNMEASURED, Segmenter, with_background
from roclip.oracle.segmenters.mask_sets import read_labels, without_background
from roclip.storage import sha256_file

SEMANTIC_SIDE_PX, INSTANCE_SIDE_PX = 520, 800
"""Input sides at which torchvision evaluated its own weights."""
MIN_INSTANCE_SCORE = 0.5
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet mean and standard deviation, with which torchvision's networks were trained."""
_HEADS = ("classifier.4.weight", "classifier.high_classifier.weight", "roi_heads.box_predictor.cls_score.weight")
"""Weights whose first axis is background and classes."""


class TorchvisionSegmenter(Segmenter):
    """A network of `torchvision.models.segmentation`, or a Mask R-CNN of `torchvision.models.detection`.

    Its classes are read from a labels.json beside the weights; without one they are those of torchvision's own weights, if
    the number of classes matches (21 for VOC, 91 for COCO).

    Args:
        name: torchvision's name of the network, such as `deeplabv3_resnet50` or `maskrcnn_resnet50_fpn`.
        weights: Local file; nothing is downloaded.
        size_px: Side of the network's input; 0 takes the side at which torchvision evaluated its own weights.

    Raises `ConfigError` for an unknown network, `CheckpointError` for weights that are missing, unsafe or of another network.
    """

    def __init__(self, name: str, weights: Path, size_px: int = 0, batch_size: int = 8):
        if name not in network_names():
            raise ConfigError(f"oracle.weights: expected one of {', '.join(network_names())}, got {name!r}.")
        state = {key: value for key, value in read_weights(weights).items() if not key.startswith("aux_classifier.")}
        head = next((state[key] for key in _HEADS if key in state), None)
        if head is None:
            raise CheckpointError(f"{weights}: expected weights of {name}, got a file without its last layer.")
        self._instances = name.startswith("maskrcnn")
        self.size_px = size_px or (INSTANCE_SIDE_PX if self._instances else SEMANTIC_SIDE_PX)
        self.labels = _class_names(weights, len(head))
        self.batch_size, self.device = batch_size, device_at_hand()
        self.net = _build(name, state, len(head), self.size_px if self._instances else 0, weights).to(self.device)
        self.calibration = dict.fromkeys(self.labels, UNMEASURED)
        self.info = {
            "name": f"torchvision {name}",
            "provenance": f"{weights.name}, trained elsewhere on {len(self.labels)} classes",
            "sha256": sha256_file(weights),
            "licence": "network BSD-3-Clause; weights: that of their source",
            "independent_of_clip": True,
            "calibrated": False,
        }

    @torch.inference_mode()
    def maps(self, images: np.ndarray) -> Iterator[Tensor]:
        for start in range(0, len(images), self.batch_size):
            batch = np.ascontiguousarray(images[start : start + self.batch_size])
            pixels = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).float().div(255)
            yield (self._instance_maps(pixels) if self._instances else self._semantic_maps(pixels)).cpu()

    def _semantic_maps(self, pixels: Tensor) -> Tensor:
        size = pixels.shape[-2:]
        pixels = F.interpolate(pixels, self.size_px, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        maps = self.net((pixels - mean) / std)["out"].softmax(dim=1)
        return F.interpolate(maps, size, mode="area") if max(size) < self.size_px else maps

    def _instance_maps(self, pixels: Tensor) -> Tensor:
        evidence = pixels.new_zeros(len(pixels), len(self.labels), *pixels.shape[-2:])
        for maps, detections in zip(evidence, self.net(list(pixels)), strict=True):
            for label, score, mask in zip(detections["labels"], detections["scores"], detections["masks"], strict=True):
                if score >= MIN_INSTANCE_SCORE:
                    label_map = maps[int(label) - 1]
                    torch.maximum(label_map, mask[0] * score, out=label_map)
        return with_background(evidence)


def network_names() -> list[str]:
    """Return the names of the supported networks."""
    semantic = torchvision.models.list_models(module=torchvision.models.segmentation)
    instance = torchvision.models.list_models(module=torchvision.models.detection, include="maskrcnn*")
    return sorted([*semantic, *instance])


def _build(name: str, state: dict[str, Tensor], classes: int, min_size_px: int, weights: Path) -> nn.Module:
    sizes: dict[str, Any] = {"min_size": min_size_px, "max_size": 2 * min_size_px} if min_size_px else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes, **sizes)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{weights}: expected weights of {name}, got others ({' '.join(str(error).split())[:200]})."
        ) from error
    return net.eval()


def _class_names(weights: Path, number: int) -> tuple[str, ...]:
    """Return K names for a network of `number` = 1 + K classes."""
    beside = weights.with_name("labels.json")
    published: Sequence[str] = ()
    if beside.is_file():
        names = without_background(read_labels(beside))
    else:
        published = {
            21: torchvision.models.segmentation.DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"],
            91: torchvision.models.detection.MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"],
        }.get(number, ())
        names = list(published[1:])
    if len(names) != number - 1:
        raise CheckpointError(
            f"{weights}: expected the names of {number - 1} classes in {beside}, got {len(names)}. Write them there: a "
            "JSON list in the order of the classes, without background."
        )
    return tuple(names)
