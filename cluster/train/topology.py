"""One line that says where the ranks of a training run and how fast their network is.

With a bandwidth b, measured at the start, a gradient of n bytes takes n * 2 (W-1)/W / b. No hostfile: Ray places the ranks and
tells each where rank 0 listens.
"""

import os
import time

import torch

from cluster.ray.network import ring_bytes
from roclip import distributed
from roclip.model.towers import Towers

_FIRST_BYTES, _LAST_BYTES, _LONG_ENOUGH_S = 1 << 20, 1 << 28, 0.05


def topology_line(towers: Towers, node: str) -> str:
    """Nodes and ranks, backend and interface, bandwidth, and the time to all-reduce the gradients. Call it on all ranks.

    Args:
        node: Identifies this rank's node.
    """
    ranks, nodes = distributed.world_size(), distributed.gather_objects(node)
    place = f"{_count(len(set(nodes)), 'node')}, {_count(ranks, 'rank')}"
    if ranks == 1:
        return f"{place}: no all-reduce"
    sent_bytes, bandwidth = gradient_bytes(towers), measured_bandwidth(towers.logit_scale.device)
    return (
        f"{place}, {_transport()}, {bandwidth / 1e9:.2f} GB/s: all-reduce of {sent_bytes / 1e6:.1f} MB of gradients "
        f"in {ring_bytes(sent_bytes, ranks) / bandwidth * 1e3:.1f} ms"
    )


def gradient_bytes(towers: Towers) -> int:
    """Bytes of the gradients of all trainable weights, whole at any ZeRO stage, in the precision in which the ranks send them."""
    learn = [parameter for parameter in towers.parameters() if parameter.requires_grad]
    return sum(getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size() for parameter in learn)


def measured_bandwidth(device: torch.device) -> float:
    """Bandwidth of a ring all-reduce in bytes per second, measured with one that takes 50 ms or moves 256 MiB.

    Call it on all ranks."""
    sent_bytes, ranks = _FIRST_BYTES, distributed.world_size()
    distributed.all_sum(torch.zeros(1, device=device))  # the first collective also connects
    while True:
        message = torch.zeros(sent_bytes // 4, device=device)
        distributed.barrier()
        start_s = time.perf_counter()
        distributed.sum_in_place(message)
        took = torch.tensor(time.perf_counter() - start_s, dtype=torch.float64)
        took_s = float(distributed.all_sum(took)) / ranks
        if took_s >= _LONG_ENOUGH_S or sent_bytes >= _LAST_BYTES:
            return ring_bytes(sent_bytes, ranks) / took_s
        sent_bytes *= 2


def _transport() -> str:
    backend = distributed.backend()
    interface = os.environ.get("GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME", "")
    return f"{backend} over {interface}" if interface else backend


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
