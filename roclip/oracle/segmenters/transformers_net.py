"""Segmentation models of Hugging Face transformers as oracles, from a local folder. Requires the extra `hf`.

Letters: n images of a batch, K classes, Q queries of a universal model, P prompted points, h and w of the maps.
"""

import hashlib
import importlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roclip.errors import CheckpointError, ConfigError
from roclip.model.towers import device_at_hand
from roclip.oracle.segmenters.base import UNMEASURED, Segmenter, with_background
from roclip.storage import sha256_file

UNIVERSAL = ("mask2former", "maskformer", "oneformer")
SEMANTIC = ("segformer", "upernet", "beit", "data2vec-vision", "mobilevit", "mobilenet_v2", "dpt")
PROMPT = "a photo of a {}"
TASK = "the task is semantic"
"""Task prompt of OneFormer."""
SAM_GRID = 8
"""Prompt points along each side of the grid for SAM."""
MIN_MASK_SCORE, MIN_CLASS_SCORE = 0.5, 0.5
"""Minimum of SAM's predicted IoU of a mask, and of the classifier's probability of its class."""
_LICENCE = "that of the model card"


def open_hf(folder: Path, labels: Sequence[str], classifier: Path | None = None) -> Segmenter:
    """Open the oracle in a folder written by `save_pretrained`.

    It is a universal or semantic segmentation model, CLIPSeg (prompted with `labels`), or SAM, whose masks are named by the
    image classifier in the folder `classifier`.

    Raises `ConfigError` without transformers or for another kind of model, `CheckpointError` for a folder that cannot be
    read or holds pickled weights.
    """
    kind = _load("AutoConfig", folder).model_type
    if kind == "sam":
        if classifier is None:
            raise ConfigError(f"{folder}: SAM has no class names. Add a classifier: hf:{folder}:CLASSIFIER_FOLDER.")
        return SamSegmenter(folder, classifier)
    if kind == "clipseg":
        return ClipSegSegmenter(folder, labels)
    if kind in UNIVERSAL or kind in SEMANTIC:
        return HuggingFaceSegmenter(folder, kind)
    raise ConfigError(
        f"{folder}: expected a model of type {', '.join((*UNIVERSAL, *SEMANTIC, 'clipseg', 'sam'))}, got {kind!r}."
    )


class _Net(Segmenter):
    """Common base: loads the model and iterates over batches."""

    batch_size = 4

    def __init__(self, folder: Path, kind: str, task: str, labels: Sequence[str], independent: bool):
        self.device = device_at_hand()
        self.net: Any = _load(task, folder).to(self.device).eval()
        self.labels = tuple(labels)
        self.calibration = dict.fromkeys(self.labels, UNMEASURED)
        self.info = {
            "name": f"transformers {kind}",
            "provenance": f"{folder.name}, trained elsewhere",
            "sha256": _sha256(folder),
            "licence": _LICENCE,
            "independent_of_clip": independent,
            "calibrated": False,
        }

    @torch.inference_mode()
    def maps(self, images: np.ndarray) -> Iterator[Tensor]:
        for start in range(0, len(images), self.batch_size):
            yield self._maps(images[start : start + self.batch_size]).float().cpu()

    @abstractmethod
    def _maps(self, images: np.ndarray) -> Tensor:
        """Return maps (n, 1 + K, h, w) of images (n, H, W, 3) uint8."""
        ...

    def _to_device(self, inputs: Any) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in inputs.items()}


class HuggingFaceSegmenter(_Net):
    """Mask2Former, MaskFormer, OneFormer, SegFormer and similar models with a closed set of classes, trained on masks."""

    def __init__(self, folder: Path, kind: str):
        names = _load("AutoConfig", folder).id2label
        labels = [str(names[number]) for number in sorted(names)]
        self._universal = kind in UNIVERSAL
        task = "AutoModelForUniversalSegmentation" if self._universal else "AutoModelForSemanticSegmentation"
        super().__init__(folder, kind, task, labels, independent=True)
        self._task: Tensor | None = None
        if kind == "oneformer":
            padding = {"padding": "max_length", "max_length": self.net.config.task_seq_len, "truncation": True}
            self._task = _load("AutoTokenizer", folder)([TASK], return_tensors="pt", **padding)["input_ids"]
        more = {} if self._task is None else {"class_info_file": None}  # only OneFormer's training needs that file
        self._processor = _load("AutoImageProcessor", folder, **more)

    def _maps(self, images: np.ndarray) -> Tensor:
        inputs = self._processor(images=list(images), return_tensors="pt")
        if self._task is not None:
            inputs["task_inputs"] = self._task.repeat(len(images), 1)
        output = self.net(**self._to_device(inputs))
        if not self._universal:  # a semantic model has no background class
            shares = output.logits.softmax(dim=1)
            return torch.cat([torch.zeros_like(shares[:, :1]), shares], dim=1)
        classes = output.class_queries_logits.softmax(dim=-1)[..., :-1]
        evidence = torch.einsum("nqk,nqhw->nkhw", classes, output.masks_queries_logits.sigmoid())
        return with_background(evidence.clamp(0, 1))


class ClipSegSegmenter(_Net):
    """CLIPSeg, prompted with each label. It is built on a CLIP, so it is not independent of CLIP."""

    def __init__(self, folder: Path, labels: Sequence[str]):
        super().__init__(folder, "clipseg", "CLIPSegForImageSegmentation", labels, independent=False)
        self._processor = _load("AutoProcessor", folder)

    def _maps(self, images: np.ndarray) -> Tensor:
        prompts = [PROMPT.format(label) for label in self.labels]
        search_forwards = [
            self._processor(
                text=prompts, images=[image] * len(prompts), padding=True, truncation=True, return_tensors="pt"
            )
            for image in images
        ]
        logits = [self.net(**self._to_device(inputs)).logits for inputs in search_forwards]
        size = logits[0].shape[-2:]  # a single prompt comes without the prompt axis
        return with_background(torch.stack([maps.view(len(prompts), *size) for maps in logits]).sigmoid())


class SamSegmenter(_Net):
    """SAM's masks at a grid of points, each named by an image classifier applied to its crop.

    It counts as independent of CLIP unless the classifier is a CLIP.
    """

    def __init__(self, folder: Path, classifier: Path):
        config = _load("AutoConfig", classifier)
        names = [str(config.id2label[number]) for number in sorted(config.id2label)]
        super().__init__(folder, "sam", "SamModel", names, independent="clip" not in config.model_type)
        self._processor = _load("AutoProcessor", folder)
        self._classifier: Any = _load("AutoModelForImageClassification", classifier).to(self.device).eval()
        self._prepare = _load("AutoImageProcessor", classifier)
        self.info |= {
            "name": f"transformers sam, named by {config.model_type}",
            "provenance": f"{folder.name} and {classifier.name}, trained elsewhere",
            "sha256": hashlib.sha256(f"{_sha256(folder)} {_sha256(classifier)}".encode()).hexdigest(),
        }

    def _maps(self, images: np.ndarray) -> Tensor:
        return with_background(torch.stack([self._evidence(image) for image in images]))

    def _evidence(self, image: np.ndarray) -> Tensor:
        """Return evidence (K, H, W): for each class the maximum over its masks of mask times class probability."""
        height, width = image.shape[:2]
        evidence = torch.zeros(len(self.labels), height, width, device=self.device)
        for mask in self._masks(image):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            crop = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            inputs = self._to_device(self._prepare(images=crop, input_data_format="channels_last", return_tensors="pt"))
            score, best = self._classifier(**inputs).logits[0].softmax(dim=0).max(dim=0)
            if score >= MIN_CLASS_SCORE:
                class_map = evidence[int(best)]
                torch.maximum(class_map, torch.from_numpy(mask).to(class_map) * score, out=class_map)
        return evidence

    def _masks(self, image: np.ndarray) -> list[np.ndarray]:
        """Return the distinct masks (H, W) bool with a predicted IoU of at least `MIN_MASK_SCORE`."""
        height, width = image.shape[:2]
        grid = (np.arange(SAM_GRID) + 0.5) / SAM_GRID
        points = [[[[float(x * width), float(y * height)]] for y in grid for x in grid]]
        inputs = self._processor(images=[image], input_points=points, return_tensors="pt")
        sizes, resized = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        output = self.net(**self._to_device(inputs), multimask_output=False)
        masks = self._processor.post_process_masks(output.pred_masks.cpu(), sizes, resized)[0][:, 0].numpy()
        confident = output.iou_scores[0, :, 0].cpu().numpy() >= MIN_MASK_SCORE
        different = {mask.tobytes(): mask for mask in masks[confident] if mask.any()}
        return list(different.values())


def _load(name: str, folder: Path, **more: Any) -> Any:
    """Load a local folder with a class of transformers. Raises `ConfigError` or `CheckpointError`."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError("oracle.weights=hf:…: expected transformers, got none. Install roclip[hf].") from error
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder / 'config.json'}: expected a model of transformers, got no such file.")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, **more}
    if "Model" in name or "For" in name:
        _sha256(folder)  # raises if there is only a pickle
        options["use_safetensors"] = True
    try:
        return getattr(transformers, name).from_pretrained(str(folder), **options)
    except Exception as error:  # each of its models has errors of its own
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: {name} cannot read it ({type(error).__name__}: {reason}).") from error


def _sha256(folder: Path) -> str:
    """Digest of the weights file, or over the digests of several."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder}: expected its weights in model.safetensors, got none. A pickle is refused: convert it elsewhere."
        )
    sums = [sha256_file(file) for file in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()
