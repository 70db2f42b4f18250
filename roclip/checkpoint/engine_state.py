"""The optimizer's state as named tensors of whole weights: the same for any number of ranks and any ZeRO stage.

DeepSpeed writes one file per rank, which only the same number of ranks at the same stage can load. Here the parts are put
together weight by weight through its public accessors, so a checkpoint does not depend on the ranks that made it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roclip import distributed
from roclip.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32"
"""The optimizer's own copy of a weight, kept where the model's is rounded to bf16."""


def optimizer_state(engine: Any, copy: Callable[[str, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """`<moment>.<weight>` for each trainable weight, and `step`, on the CPU of rank 0; an empty dict on other ranks.

    Before the first step there are no moments, and `step` is 0. `copy` makes the fp32 copy of a named tensor, for a
    caller that reuses memory. Call it on all ranks.
    """
    copy = copy or (lambda _, value: value.detach().to("cpu", torch.float32, copy=True))
    leader, state = distributed.rank() == 0, {}
    _link(engine.optimizer)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    step = next((held["step"].cpu().clone() for held in inner.state.values() if "step" in held), None)
    if leader:
        state["step"] = torch.zeros(()) if step is None else step
    moments = () if step is None else MOMENTS
    for name, parameter in _trainable(engine):
        for key in (*moments, *([MASTER] if parameter.dtype != torch.float32 else [])):
            value = _get(engine, parameter, key)
            if leader and value is not None:
                state[f"{key}.{name}"] = copy(f"{key}.{name}", value)
    return state


def load_optimizer_state(engine: Any, state: dict[str, Tensor]) -> None:
    """Load the result of `optimizer_state` into an engine that has taken no step yet and whose weights are already loaded.

    Raises `CheckpointError` if a weight has no state.
    """
    moments = MOMENTS if state["step"] else ()  # before the first step there are none
    if moments:
        _make_room(engine, state["step"])
    for name, parameter in _trainable(engine):
        missing = [key for key in moments if f"{key}.{name}" not in state]
        if missing:
            raise CheckpointError(
                f"optimizer.safetensors: expected {', '.join(missing)} of {name}, got none. Was the checkpoint made with this "
                "weight locked? Lock the same layers, or start a new run from its weights."
            )
        for key in moments:
            _set(engine, parameter, key, state[f"{key}.{name}"].to(parameter.device))
        master = state.get(f"{MASTER}.{name}")
        _set(engine, parameter, MASTER, _whole(parameter) if master is None else master.to(parameter.device))


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy whole weights and buffers into a module whose weights may be rounded or in parts. Call it on all ranks."""
    for name, buffer in module.named_buffers():
        if name in weights:
            buffer.copy_(weights[name].to(buffer.device))
    for name, parameter in module.named_parameters():
        with torch.no_grad(), _gathered(parameter):
            if parameter.numel():
                parameter.copy_(weights[name].reshape(parameter.shape).to(parameter.device))


def _trainable(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def _get(engine: Any, parameter: nn.Parameter, key: str) -> Tensor | None:
    if engine.zero_optimization_stage() == 0:
        return engine.optimizer.state.get(parameter, {}).get(key)
    from deepspeed import utils  # seconds to import, and only training needs it

    if key == MASTER:
        return utils.safe_get_full_fp32_param(parameter)
    return utils.safe_get_full_optimizer_state(parameter, key)


def _set(engine: Any, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    if engine.zero_optimization_stage() == 0:
        if key != MASTER:
            engine.optimizer.state[parameter][key].copy_(value)
        return
    from deepspeed import utils

    value, parts = value.float(), hasattr(parameter, "ds_id")
    if parts:  # this rank's part; DeepSpeed 0.19.8 cannot cut a weight of fewer elements than ranks
        share = _part_of(parameter).numel()
        padding = share * distributed.world_size() - value.numel()
        value = F.pad(value.flatten(), (0, padding))[share * distributed.rank() :][:share]
    if key == MASTER:
        (utils.safe_set_local_fp32_param if parts else utils.safe_set_full_fp32_param)(parameter, value)
    else:
        (utils.safe_set_local_optimizer_state if parts else utils.safe_set_full_optimizer_state)(parameter, value, key)


def _make_room(engine: Any, step: Tensor) -> None:
    """Allocate what the first step would: zero moments for each tensor that the inner optimizer updates."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3 passes one part at a time
    tensors = flat or [tensor for group in inner.param_groups for tensor in group["params"]]
    for tensor in tensors:
        inner.state[tensor] = {
            "step": step.clone().to(tensor.device),
            **{key: torch.zeros_like(tensor, memory_format=torch.preserve_format) for key in MOMENTS},
        }
    _link(optimizer)


def _link(optimizer: Any) -> None:
    """Let ZeRO 1 and 2 find the moments of each weight. They link them after the first step of the first group of weights,
    when the other groups have none yet (DeepSpeed 0.19.8), and never again."""
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _whole(parameter: nn.Parameter) -> Tensor:
    with _gathered(parameter):
        return parameter.detach().clone()


def _gathered(parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    """Context in which a partitioned weight is whole; what rank 0 writes to it there is kept."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0)


def _part_of(parameter: Any) -> Tensor:
    """This rank's part of a weight under ZeRO 3."""
    return parameter.ds_tensor
