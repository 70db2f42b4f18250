"""Programs of Debian's packages, which tests install where they may."""

import contextlib
import os
import shutil
import subprocess
from functools import cache

import pytest
from own_network import outside

_APT = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::http::Timeout=20"]


def program(name: str, package: str) -> str:
    """Where a program is, after installing its package if it is missing and we are root; else skips the test."""
    if not shutil.which(name):
        _install(package)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on this machine: install Debian's package {package}")
    return found


@cache
def _install(package: str) -> None:
    """Tried once, and once more with new lists of what there is."""
    if os.geteuid() or not shutil.which("apt-get"):
        return
    install = ["install", "-y", "--no-install-recommends", package]
    for words in (install, ["update"], install):
        with contextlib.suppress(subprocess.TimeoutExpired):
            environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            with outside():
                done = subprocess.run([*_APT, *words], capture_output=True, env=environment, timeout=300)
            if words is install and not done.returncode:
                return
