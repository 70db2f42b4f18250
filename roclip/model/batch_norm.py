"""Batch norm in fp32, optionally over the global batch, and batch norm that leaves its running statistics alone.

Letters: C channels, W world size, N elements of a channel on one rank.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roclip.distributed import all_sum, gather, world_size


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm with fp32 statistics, whatever the precision of the weights, and over all ranks if `across_ranks`.

        y = (x - m) / sqrt(v + eps) * weight + bias,  m and v over the samples of this rank, or of all

    Over all ranks, forward and backward equal one process with the whole batch (tested), for equal batches on any
    device; torch's `SyncBatchNorm` does that on GPUs only. Parameters, buffers and their names are `nn.BatchNorm2d`'s.
    """

    across_ranks = False
    frozen = False
    """Use the running statistics in training too, as in evaluation."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()  # DeepSpeed's bf16 leaves the statistics in fp32
        mean, variance = self.running_mean, self.running_var
        if self.frozen or not self.training:
            return F.batch_norm(input, mean, variance, weight, bias, eps=self.eps)
        momentum = self.momentum if self.momentum is not None else 0.0
        tracked = self.track_running_stats
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if not self.across_ranks or world_size() == 1:
            running = (mean, variance) if tracked else (None, None)
            return F.batch_norm(input, *running, weight, bias, training=True, momentum=momentum, eps=self.eps)
        batch_mean, batch_variance = _global_statistics(input)
        if tracked and mean is not None and variance is not None:
            elements = input.numel() / input.shape[1] * world_size()
            mean.lerp_(batch_mean, momentum)
            variance.lerp_(batch_variance * elements / max(elements - 1, 1), momentum)
        return _Normalize.apply(input, weight, bias, batch_mean, batch_variance, self.eps)  # pyright: ignore


def converted(module: nn.Module, across_ranks: bool, frozen: bool = False) -> nn.Module:
    """`module` with each `nn.BatchNorm2d` replaced by a layer with the same state: torch's `SyncBatchNorm` for statistics over
    all ranks on CUDA, ours otherwise."""
    if across_ranks and not frozen and torch.cuda.is_available():
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for norm in module.modules():
        if type(norm) is nn.BatchNorm2d and norm.affine:
            norm.__class__ = BatchNorm2d
            norm.across_ranks, norm.frozen = across_ranks, frozen  # pyright: ignore
    return module


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Context in which batch norm in training mode normalises with the batch but leaves its running statistics alone, for a
    repeated pass over the same samples."""
    kinds = nn.modules.batchnorm._BatchNorm
    norms: list[Any] = [norm for norm in module.modules() if isinstance(norm, kinds) and norm.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # passing None would change what autograd saves, which checkpointing refuses
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) in fp32: local ones, merged by Chan's formula in one collective."""
    variance, mean = torch.var_mean(x.detach().float(), dim=(0, 2, 3), correction=0)
    means, variances = gather(torch.stack([mean, variance])[None]).unbind(dim=1)  # (W, C) each
    mean = means.mean(dim=0)
    return mean, variances.mean(dim=0) + (means - mean).square().mean(dim=0)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, inverse_deviation = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        dy = gradient.float()
        normal = (x.float() - mean.view(shape)) * inverse_deviation.view(shape)
        bias_gradient, weight_gradient = dy.sum(dim=(0, 2, 3)), (dy * normal).sum(dim=(0, 2, 3))
        elements = x.numel() / x.shape[1] * world_size()
        of_bias, of_weight = all_sum(torch.stack([bias_gradient, weight_gradient])) / elements
        centred = dy - of_bias.view(shape) - normal * of_weight.view(shape)
        x_gradient = centred * (weight * inverse_deviation).view(shape)
        return x_gradient.to(x.dtype), weight_gradient, bias_gradient, None, None, None
