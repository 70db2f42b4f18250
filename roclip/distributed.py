"""Rank, world size and the collectives of a step. Nothing else in this package touches `torch.distributed`.

Without an initialised process group everything here behaves as with one process.
Letters: B local batch, G global batch = B x world size (rank-major).
"""

import datetime
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
SMALL = 1 << 16
"""Tensors with fewer elements are sent together: their latency costs more than the copy."""


def start(timeout_s: float) -> None:
    """Join the process group that the environment describes (`torchrun`). A collective that takes longer than this fails."""
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(seconds=timeout_s)
    )


def backend() -> str:
    return dist.get_backend()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def lead(work: Callable[[], T], heartbeat_s: float = 10.0) -> T:
    """Run `work` on rank 0 and return its result on every rank, or raise its error there, which must be picklable.

    It may take as long as it likes: the other ranks hear regularly that it is still running, so no collective times out.
    """
    if world_size() == 1:
        return work()
    with ThreadPoolExecutor(1) as thread:
        task = thread.submit(work) if rank() == 0 else None
        while True:
            if task is not None:
                wait([task], heartbeat_s)
            done, problem, result = broadcast_object(_outcome(task) if task is not None else None)
            if problem is not None:
                raise problem
            if done:
                return result


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def broadcast(value: Tensor) -> Tensor:
    """Rank 0's `value` on every rank; all ranks pass a tensor of the same shape."""
    if world_size() == 1:
        return value
    sent = _sendable(value).contiguous()
    dist.broadcast(sent, src=0)
    return sent.to(value.device)


def gather(local: Tensor) -> Tensor:
    """Gather (B, …) of each rank to (G, …) on all, rank-major, without a gradient."""
    if world_size() == 1:
        return local.detach()
    sent = _sendable(local.detach()).contiguous()
    pieces = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(pieces, sent)
    return torch.cat(pieces).to(local.device)


def gather_with_gradient(local: Tensor) -> Tensor:
    """Gather (B, …) to (G, …), rank-major; in the backward pass each rank gets the sum of all ranks' gradients for its rows.

    With a loss over local rows and DeepSpeed's mean over ranks this gives exactly the one-process gradient.
    """
    return local if world_size() == 1 else _Gather.apply(local)  # pyright: ignore[reportReturnType]


def all_sum(value: Tensor) -> Tensor:
    """The sum over ranks, without a gradient."""
    total = _sendable(value.detach().clone())
    if world_size() > 1:
        dist.all_reduce(total)
    return total.to(value.device)


def sum_in_place(value: Tensor) -> None:
    """Replace a tensor by its sum over ranks; on a GPU too it is complete when this returns."""
    dist.all_reduce(value)
    if value.is_cuda:
        torch.cuda.synchronize()


def mean_in_place(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their means over ranks. Large ones are not copied; small ones travel together."""
    if world_size() == 1:
        return
    tensors = list(tensors)
    small = [t for t in tensors if t.numel() < SMALL or not t.is_contiguous()]
    packed = torch.cat([t.flatten() for t in small]) if small else torch.empty(0)
    apart = {id(t) for t in small}
    sent = [packed, *(t for t in tensors if id(t) not in apart)]
    for work in [dist.all_reduce(t, async_op=True) for t in sent if t.numel()]:
        work.wait()  # pyright: ignore[reportOptionalMemberAccess]
    for t in sent:
        t.div_(world_size())
    for t, mean in zip(small, packed.split([t.numel() for t in small]), strict=True):
        t.copy_(mean.view(t.shape))


def mean_buffers(module: torch.nn.Module) -> None:
    """Replace floating-point buffers (batch-norm statistics) by their mean over ranks, in place."""
    if world_size() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(world_size())


def _sendable(value: Tensor) -> Tensor:
    """A copy on a device that the process group can send from: NCCL sends no CPU memory."""
    return value.cuda() if dist.is_initialized() and dist.get_backend() == dist.Backend.NCCL else value


def _outcome(task: Future[T]) -> tuple[bool, BaseException | None, T | None]:
    if not task.done():
        return False, None, None
    problem = task.exception()
    return True, problem, None if problem else task.result()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.rows = local.shape[0]
        return gather(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        start = rank() * ctx.rows
        return total[start : start + ctx.rows]
