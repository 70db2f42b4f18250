"""The DeepSpeed engine around the towers: optimizer, precision, ZeRO stage, and the gradients between backward and step."""

import os
import socket
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from roclip import distributed
from roclip.config import TrainConfig
from roclip.data.stream import rows_of_rank
from roclip.model.towers import MAX_LOG_SCALE, Towers

deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
"""On a CPU DeepSpeed would compile, for a minute at first use, an all-reduce that only its inference calls."""


def build_engine(towers: Towers, config: TrainConfig) -> Any:
    """The DeepSpeed engine of this rank. It joins the existing process group, or starts one from the environment (`torchrun`,
    Ray Train); without either it is a world of one process."""
    if "RANK" not in os.environ and not torch.distributed.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if not torch.distributed.is_initialized():
        distributed.start(config.collective_timeout_s)
    if distributed.world_size() == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it at each engine
    if config.compile:
        towers.clip.visual.compile()  # in place, so that the weights keep their names
        getattr(towers.clip, "text", towers.clip).transformer.compile()
    optimizer = torch.optim.AdamW(
        parameter_groups(towers, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=towers, optimizer=optimizer, config=deepspeed_config(config, distributed.world_size())
    )
    if engine.zero_optimization_stage() == 0:
        engine.allreduce_gradients = partial(_mean_gradients, engine)
    return engine


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed settings of a run. Gradient clipping is always set, since DeepSpeed clips at 1.0 by default.

    ZeRO-1 on one rank in fp32 becomes stage 0: there is nothing to shard, and it would copy each gradient and weight.
    """
    pieces = config.grad_accum_steps
    rows = rows_of_rank(config.global_batch_size, world_size, pieces)
    alone = world_size == 1 and config.zero_stage == 1 and config.precision == "fp32"
    return {
        "train_batch_size": rows * world_size,
        "train_micro_batch_size_per_gpu": rows // pieces,
        "gradient_accumulation_steps": pieces,
        "gradient_clipping": config.grad_clip_norm,
        "zero_optimization": {"stage": 0 if alone else config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # pieces are added up in fp32 at any precision
        "steps_per_print": 10**9,
    }


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups with weight decay for matrices only: not for gains, biases, position embeddings or the temperature."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    plain = [p for name, p in named if p.ndim < 2 or "positional" in name or name.endswith("class_embedding")]
    decayed = [p for name, p in named if not any(p is q for q in plain)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _mean_gradients(engine: Any, bucket_size: int = 0) -> None:
    """Gradient reduction for stage 0. It replaces DeepSpeed's, which copies all gradients into buckets and back even on one rank.

    A weight without a gradient, such as the text tower's in a matched step, gets zeros, so that the optimizer treats it the
    same at each stage.
    """
    if engine.is_gradient_accumulation_boundary():
        learns = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        for parameter in learns:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        distributed.mean_in_place(parameter.grad for parameter in learns)


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def step(engine: Any, towers: Towers) -> None:
    """The optimizer step. Then the logit scale is clamped, and ZeRO-3's gradients are zeroed, which it would otherwise apply
    again to weights without a gradient in the next step, such as the text tower's in a matched one."""
    engine.step()
    clamp_logit_scale(towers)
    gradients = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    if gradients is not None:
        gradients.zero_()


def gradients(engine: Any) -> tuple[list[Tensor], bool]:
    """The mean gradients that this rank holds between the backward pass and the step, and whether they are only this rank's shard
    (ZeRO) or all of them."""
    if engine.zero_optimization_stage() == 0:
        return [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None], False
    if hasattr(engine.optimizer, "fp32_groups_gradients_flat"):  # ZeRO 1 in bf16 divides the weights' copy only
        return engine.optimizer.fp32_groups_gradients_flat, False
    held = engine.optimizer.averaged_gradients.values()
    return [gradient for group in held if group is not None for gradient in group if gradient is not None], True


def gradient_norm(engine: Any) -> Tensor:
    """The norm of the mean gradient over all weights, before clipping: a scalar, the same on all ranks."""
    held, in_parts = gradients(engine)
    norms = torch._foreach_norm([gradient.float() for gradient in held])
    square = torch.stack([*norms, torch.zeros((), device=engine.device)]).square().sum()
    return (distributed.all_sum(square) if in_parts else square).sqrt()


def leave_out(engine: Any, towers: Towers) -> None:
    """Discard the gradients of the backward pass instead of taking a `step`. No weight or moment changes.

    ZeRO skips a step by itself where a gradient is not finite, so NaN is written into its gradients.
    """
    if engine.zero_optimization_stage() == 0:
        engine.zero_grad()
        return
    for gradient in gradients(engine)[0]:
        gradient.fill_(torch.nan)
    step(engine, towers)


def clamp_logit_scale(towers: Towers) -> None:
    """Clamp the log of the logit scale to [0, ln 100], in the weights and in the optimizer's fp32 copy, at any ZeRO stage.

    Each rank clamps what it holds, without a collective and without waiting for the device.
    """
    parameter: Any = towers.logit_scale
    held = [parameter.data]
    if hasattr(parameter, "ds_tensor"):  # ZeRO 3: this rank's part of the weight, and of its fp32 copy
        held += [parameter.ds_tensor.data, safe_get_local_fp32_param(parameter)]
    elif getattr(parameter, "_hp_mapping", None) is not None:  # ZeRO 1 and 2, bf16: this rank's part of the fp32 copy
        held += [parameter._hp_mapping.get_hp_fragment()]
    for values in held:
        values.detach().clamp_(0.0, MAX_LOG_SCALE)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
