"""Builds the DeepSpeed engine around the towers: optimizer, precision, ZeRO stage."""

import os
import socket
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_set_full_fp32_param
from torch import nn

from roclip import distributed
from roclip.config import TrainConfig
from roclip.model import MAX_LOG_SCALE, Towers


def build_engine(towers: Towers, config: TrainConfig) -> Any:
    """The DeepSpeed engine of this rank. Joins the process group that exists, or starts one from the environment
    (`torchrun`, Ray Train); without either, one process alone."""
    if "RANK" not in os.environ and not torch.distributed.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    optimizer = torch.optim.AdamW(
        parameter_groups(towers, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=towers, optimizer=optimizer, config=deepspeed_config(config, distributed.world_size())
    )
    return engine


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed settings of a run. Gradient clipping is always named: DeepSpeed clips at 1.0 unless told not to."""
    return {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.global_batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 10**9,
    }


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only: not for gains, biases, embeddings of position or the temperature."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    plain = [p for name, p in named if p.ndim < 2 or "positional" in name or name.endswith("class_embedding")]
    decayed = [p for name, p in named if not any(p is q for q in plain)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def clamp_logit_scale(towers: Towers) -> None:
    """Hold s at ln 100 at most, in the weights and in the optimizer's own fp32 copy of them."""
    parameter = towers.logit_scale
    if parameter.item() > MAX_LOG_SCALE:
        parameter.data.clamp_(max=MAX_LOG_SCALE)
        safe_set_full_fp32_param(parameter, parameter.data.float())


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
