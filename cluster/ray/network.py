"""The network between the ranks of a training: its settings, its interface, and what an all-reduce sends over it."""

import os
import socket
from collections.abc import Mapping

import psutil

PASSED_ON = ("NCCL_", "TORCH_NCCL_", "GLOO_", "TP_", "FI_", "UCX_")
"""Prefixes of the driver's environment variables about the network, which every rank gets too."""


def network_environment() -> dict[str, str]:
    """This process's network settings, to be passed to the ranks."""
    return {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}


def join_network(settings: Mapping[str, str], address: str) -> None:
    """Apply the driver's settings and let gloo use the interface that has the node's address. By itself it takes the one
    that the host's name resolves to, which is often loopback. Call it in a rank before its process group starts."""
    os.environ.update(settings)
    if interface := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str:
    """The network interface of this node that has the address, or an empty string."""
    for interface, entries in psutil.net_if_addrs().items():
        if any(entry.family in (socket.AF_INET, socket.AF_INET6) and entry.address == address for entry in entries):
            return interface
    return ""


def ring_bytes(size: int, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of `size` bytes: size x 2 (W-1)/W (Patarasuk and Yuan 2009). NCCL's
    tests call this over the time the bus bandwidth."""
    return size * 2 * (ranks - 1) / ranks
