"""A Ray of our own, whose processes know its address.

Ray Train asks the state API time and again whether its controller lives. Where nobody told a process its address, that API
looks into a file that the last `ray start` on the machine wrote, whether that Ray still runs or not: then each training
takes half a minute more to end, or is taken for dead by a Ray that never heard of it.
"""

import contextlib
import logging
import os
import random
import socket

import ray

_PORTS = range(20_000, 32_000)
"""Below those that the system hands out by itself, so that nobody is given it before Ray takes it."""


def start_local_ray(**options: object) -> None:
    """`ray.init` of a Ray on loopback, with `options`; it ends with this process."""
    port = str(_free_port())
    told = {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    before = {name: os.environ.pop(name) for name in told if name in os.environ}
    os.environ.update(told)  # its processes inherit it
    try:
        ray.init(
            address="local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            **options,  # pyright: ignore[reportArgumentType]
        )
    finally:
        for name in told:
            del os.environ[name]
        os.environ.update(before)


def _free_port() -> int:
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
