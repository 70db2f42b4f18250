import os

import pytest
import torch

from cluster.ray.network import interface_of, join_network, network_environment, ring_bytes
from cluster.train.topology import gradient_bytes


def test_interface_is_that_of_the_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") == ""


def test_network_settings_of_the_driver_win_over_what_is_found(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("NCCL_", "GLOO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5_0")
    monkeypatch.setenv("HOME_OF_NOBODY", "x")
    assert network_environment() == {"NCCL_IB_HCA": "mlx5_0"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    join_network({}, "127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    join_network({"GLOO_SOCKET_IFNAME": "ib0"}, "127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_allreduce_of_two_ranks_sends_each_byte_once():
    assert ring_bytes(10**9, ranks=2) == pytest.approx(10**9)
    assert ring_bytes(10**9, ranks=8) == pytest.approx(1.75 * 10**9)


def test_gradient_has_the_bytes_of_what_learns():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2).to(torch.bfloat16))
    module[0].bias.requires_grad_(False)
    assert gradient_bytes(module) == 4 * 12 + 2 * 10
