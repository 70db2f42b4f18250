"""open_clip towers: built from a name or a JSON file, called with pixels and tokens, saved as open_clip loads them.

Letters: B local batch, D feature width, L caption tokens, C classes.
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roclip.config import ModelConfig
from roclip.errors import CheckpointError, ConfigError
from roclip.model.options import apply_options, check_options
from roclip.model.safe_load import read_weights
from roclip.model.tensor_file import write_tensors
from roclip.storage import write_atomic

WEIGHTS = "open_clip_model.safetensors"
FOREIGN_WEIGHTS = ("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pt")
"""Other names that open_clip gives its weights; looked for in this order, after `WEIGHTS`."""
CONFIG = "open_clip_config.json"
MAX_LOG_SCALE = 4.6052
"""ln 100: the largest log of the temperature's inverse, as in CLIP."""
SIGLIP_START = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
"""ln 10 and -10, as in SigLIP (arXiv:2303.15343, section 3)."""


class Towers(nn.Module):
    """Two towers and a temperature.

    `forward(images, tokens)` returns unit-length `image_features` (B, D) and `text_features` (B, D), then the loss's other
    arguments: `logit_scale` = exp(s), one element, and `logit_bias` if the towers have one. With
    `text_gradient=False` the text tower runs without a graph: a matched step needs its features for the pool, but not
    its gradient.

    Args:
        name: An open_clip model.
        model_file: Its JSON, if open_clip does not know it.
        options: What is locked, dropped, recomputed or synchronised.
        loss: `siglip` adds SigLIP's bias and starting temperature, `clip` removes a bias; None leaves the model as its JSON
            describes it.

    Raises:
        ConfigError: no such model, or an option that it does not support.
    """

    def __init__(
        self,
        name: str,
        model_file: Path | None = None,
        *,
        options: ModelConfig | None = None,
        loss: Literal["clip", "siglip"] | None = None,
    ):
        super().__init__()
        if model_file is not None:
            open_clip.add_model_config(model_file)
        cfg = open_clip.get_model_config(name)
        if cfg is None:
            raise ConfigError(
                f"model.name: neither open_clip nor models/{name}.json beside the preset knows {name!r}. "
                f"open_clip has {', '.join(open_clip.list_models()[:5])}, …"
            )
        options = options or ModelConfig()
        check_options(cfg, options)
        if loss == "siglip":
            cfg = {**SIGLIP_START, **cfg}
        elif loss == "clip":
            cfg = {key: value for key, value in cfg.items() if key != "init_logit_bias"}
        self.name = name
        self.cfg: dict[str, Any] = cfg
        self.clip: Any = apply_options(_quiet_create(name, cfg, options.force_patch_dropout), options)
        size = self.clip.visual.image_size
        self.image_size: int = size[0] if isinstance(size, (tuple, list)) else int(size)
        self.tokenizer = open_clip.get_tokenizer(name)
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, tokens: Tensor, text_gradient: bool = True) -> tuple[Tensor, ...]:
        """`images` (B, 3, H, W) in [0, 1], `tokens` (B, L); see the class."""
        image_features = self.encode_image(images)
        with torch.set_grad_enabled(text_gradient and torch.is_grad_enabled()):
            text_features = self.encode_text(tokens)
        temperature = (self.logit_scale.float().exp(),)
        if self.logit_bias is not None:
            temperature += (self.logit_bias.float(),)
        return image_features, text_features, *temperature

    def encode_image(self, images: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to unit-length features (B, D); other sizes are resized."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, self.image_size, mode="bilinear", antialias=True, align_corners=False)
        weight_dtype = next(self.clip.parameters()).dtype
        pixels = ((images - self.mean) / self.std).to(weight_dtype)
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # convolutions are a quarter faster on a CPU
        return F.normalize(self.clip.encode_image(pixels).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) to unit-length features (B, D)."""
        return F.normalize(self.clip.encode_text(tokens).float(), dim=-1)

    @property
    def logit_scale(self) -> Tensor:
        """s, the log of the temperature's inverse: a parameter of one element, as DeepSpeed needs it."""
        return self.clip.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """SigLIP's learnt bias, a parameter of one element, or None."""
        return self.clip.logit_bias

    @property
    def context_length(self) -> int:
        """L."""
        return int(self.clip.context_length)

    @property
    def vocabulary(self) -> int:
        """Tokens that the text tower knows."""
        return int(self.clip.vocab_size)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Captions to tokens (B, L), padded and cut to the text tower's context."""
        return self.tokenizer(list(captions))

    def weights(self, copy: Callable[[str, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """A copy of all weights and buffers under open_clip's names and in its shapes, in fp32, on the CPU.

        `copy` makes the copy of a named tensor, for a caller that reuses memory. Under ZeRO-3 each rank holds a part of
        the weights and this gathers the rest: call it on all ranks.
        """
        copy = copy or (lambda _, value: value.detach().to("cpu", torch.float32, copy=True).contiguous())
        with _gathered(self.clip):
            state = {key: copy(key, value) for key, value in self.clip.state_dict().items()}
        return {
            key: value.reshape(()) if key in ("logit_scale", "logit_bias") else value for key, value in state.items()
        }

    def whole(self) -> "Towers":
        """These towers if they hold all their weights, else (ZeRO-3) a whole copy, whose forward pass does not wait for other
        ranks. For evaluation; call it on all ranks."""
        if not _partitioned(self.clip):
            return self
        open_clip.factory._MODEL_CONFIGS[self.name] = self.cfg
        return Towers(self.name)._fill(self.weights()).to(self.mean.device)

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> str:
        """Write weights and config so that `open_clip.create_model_and_transforms("local-dir:…")` loads them; returns the
        sha256 of the weights' file. `weights` is an earlier result of `weights()`, for one rank that writes for all."""
        folder.mkdir(parents=True, exist_ok=True)
        sha256 = write_tensors(folder / WEIGHTS, self.weights() if weights is None else weights, {"format": "pt"})
        preprocess = {
            "mean": list(open_clip.OPENAI_DATASET_MEAN),
            "std": list(open_clip.OPENAI_DATASET_STD),
            "interpolation": "bilinear",
            "resize_mode": "squash",
        }
        config = {"roclip_model": self.name, "model_cfg": self.cfg, "preprocess_cfg": preprocess}
        write_atomic(folder / CONFIG, json.dumps(config, indent=1))
        return sha256

    @classmethod
    def load(cls, folder: Path) -> "Towers":
        """The towers that `save` wrote, or that open_clip saved or pushed elsewhere, in evaluation mode.

        Pixels are normalised as its preprocessing config says. Nothing is downloaded and no pickled code is run.

        Raises `CheckpointError` for anything else, such as a text tower whose tokenizer is not on this machine.
        """
        state = read_weights(weights_file(folder))
        try:
            config = json.loads((folder / CONFIG).read_text())
            name, cfg = config.get("roclip_model", "checkpoint"), config["model_cfg"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder}: expected {CONFIG} with model_cfg, got {error!r}.") from error
        open_clip.factory._MODEL_CONFIGS[name] = cfg
        try:
            return cls(name)._fill(state)._see_as(config.get("preprocess_cfg") or {})
        except Exception as error:  # whatever a foreign config makes of open_clip
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{folder}: cannot build the model of {CONFIG} with these weights ({type(error).__name__}: {reason})."
            ) from error

    def begin_from(self, folder: Path) -> None:
        """Load the weights that `save` wrote, before an engine is built. Raises `CheckpointError` if they do not fit."""
        try:
            self._fill(read_weights(weights_file(folder)))
        except RuntimeError as error:
            raise CheckpointError(
                f"{folder}: expected weights of the model {self.name}, got others: {error}. Set model.name and train.loss "
                "to those of model.pretrained."
            ) from error

    def _fill(self, weights: dict[str, Tensor]) -> "Towers":
        ours = {key: weights[key].reshape(1) for key in ("logit_scale", "logit_bias") if key in weights}
        self.clip.load_state_dict({**weights, **ours})
        return self.eval()

    def _see_as(self, preprocess: dict[str, Any]) -> "Towers":
        for name, buffer in (("mean", self.mean), ("std", self.std)):
            if name in preprocess:
                buffer.copy_(torch.tensor(preprocess[name]).view(1, 3, 1, 1))
        return self


class Encoder:
    """A finished checkpoint as a function: images and captions in, unit-length features out. Only `traced` carries gradients."""

    def __init__(self, towers: Towers, batch_size: int = 256):
        self.towers = towers.eval()
        self.batch_size = batch_size

    @classmethod
    def load(cls, folder: Path) -> "Encoder":
        """Load a checkpoint's folder, onto this process's GPU if it has one."""
        return cls(Towers.load(folder).to(device_at_hand()))

    @torch.inference_mode()
    def images(self, images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        """N images (H, W, 3) uint8 to features (N, D), on the CPU. All images of a call have one size."""
        device = next(self.towers.parameters()).device
        pieces = []
        for start in range(0, len(images), self.batch_size):
            batch = np.stack(list(images[start : start + self.batch_size]))
            pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).to(device).float().div(255)
            pieces.append(self.towers.encode_image(pixels).cpu())
        return torch.cat(pieces) if pieces else torch.empty(0, 0)

    def traced(self, pixels: Tensor) -> Tensor:
        """N images (N, 3, H, W) in [0, 1] to features (N, D), on the CPU, with gradients to the pixels."""
        return self.towers.encode_image(pixels.to(next(self.towers.parameters()).device)).cpu()

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """N captions to features (N, D), on the CPU."""
        device = next(self.towers.parameters()).device
        pieces = [
            self.towers.encode_text(self.towers.tokenize(captions[start : start + self.batch_size]).to(device)).cpu()
            for start in range(0, len(captions), self.batch_size)
        ]
        return torch.cat(pieces) if pieces else torch.empty(0, 0)

    def classifier(self, labels: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Zero-shot weights (C, D): for each label the normalised mean over its filled-in templates."""
        prompts = [template.format(label) for label in labels for template in templates]
        features = self.texts(prompts).view(len(labels), len(templates), -1).mean(dim=1)
        return F.normalize(features, dim=-1)


def device_at_hand() -> torch.device:
    """The first GPU that this process sees (Ray shows a task those it was lent), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weights_file(folder: Path) -> Path:
    """The weights file of a checkpoint, under this project's name or one of open_clip's. Raises `CheckpointError`."""
    for name in (WEIGHTS, *FOREIGN_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: expected {CONFIG} and {WEIGHTS}, got no weights. Name a checkpoint's folder.")


def _quiet_create(name: str, cfg: dict[str, Any], patch_dropout: float | None) -> nn.Module:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # open_clip warns there that the weights are random, which is intended
    temperature: dict[str, Any] = {key: cfg.get(key) for key in SIGLIP_START if key in cfg or key == "init_logit_bias"}
    try:
        return open_clip.create_model(
            name,
            load_weights=False,
            pretrained_text=False,  # no weights of a text tower from elsewhere
            force_patch_dropout=patch_dropout,
            nonscalar_logit_scale=True,
            **temperature,
        )
    finally:
        root.setLevel(level)


def _partitioned(module: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _gathered(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Context in which this rank holds all weights."""
    if not _partitioned(module):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters  # seconds to import, and only training needs it

    return GatheredParameters(list(module.parameters()))
