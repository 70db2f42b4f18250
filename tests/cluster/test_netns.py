"""What the tests' own network does to frames."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from netns import Host, Network, network

SENT = 400
LISTEN = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 9))
s.settimeout(3)
print("ready", flush=True)
try:
    while True:
        s.recv(100)
        print("got", flush=True)
except TimeoutError:
    pass
"""
SEND = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for n in range(int(sys.argv[2])):
    s.sendto(b"x" * 100, (sys.argv[1], 9))
    time.sleep(0.001 if n else 0.5)  # the first finds the neighbour
"""


def arrived(sender: Host, receiver: Host) -> int:
    """How many of `SENT` datagrams did."""
    with subprocess.Popen(
        receiver.command(sys.executable, "-c", LISTEN), stdout=subprocess.PIPE, text=True
    ) as listening:
        assert listening.stdout is not None
        assert listening.stdout.readline() == "ready\n"
        subprocess.run(sender.command(sys.executable, "-c", SEND, receiver.address, SENT), check=True)
        return listening.stdout.read().count("got")


@pytest.mark.slow
def test_slow_link_loses_its_share_of_frames_and_a_cut_one_all_until_it_heals():
    def after(change: Callable[[Network, Host], None]) -> int:
        change(net, two)
        count = arrived(one, two)
        net.heal(two)
        return count

    with network() as net:
        one, two = net.add("one"), net.add("two")
        assert arrived(one, two) == SENT
        assert 0.5 * SENT < after(lambda net, host: net.slow(host, delay_s=0.002, loss_frac=0.25)) < 0.95 * SENT
        assert after(Network.cut) == 0
        assert arrived(one, two) == SENT
