"""A slow and lossy wire: carries Ethernet frames between two TAP devices that it makes.

    wire.py ONE OTHER DELAY_S LOSS_FRAC     says `ready` when both are there; ends when it is killed, and they go with it

The kernel completes checksums and cuts large segments before it hands a frame to a TAP, so both sides see a real wire.
"""

import collections
import fcntl
import os
import random
import select
import struct
import sys
import time

_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_INFO = 0x0002 | 0x1000
_FRAME_BYTES = 65536


def tap(name: str) -> int:
    """A TAP device that lives as long as the descriptor."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP_NO_INFO))
    return device


def carry(one: int, other: int, delay_s: float, loss_frac: float) -> None:
    to = {one: other, other: one}
    under_way: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for source in select.select([one, other], [], [], wait_s)[0]:
            frame = os.read(source, _FRAME_BYTES)
            if random.random() >= loss_frac:
                under_way.append((time.monotonic() + delay_s, to[source], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, target, frame = under_way.popleft()
            try:
                os.write(target, frame)
            except OSError:  # its device is down, or its queue full: lost
                continue


if __name__ == "__main__":
    devices = [tap(name) for name in sys.argv[1:3]]
    print("ready", flush=True)
    carry(*devices, *map(float, sys.argv[3:5]))
