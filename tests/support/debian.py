"""Programs of Debian's packages, which tests install where they may."""

import os
import shutil
import subprocess

import pytest


def program(name: str, package: str) -> str:
    """Where a program is, after installing its package if it is missing and we are root; else skips the test."""
    if not shutil.which(name) and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
        install = [*apt, "install", "-y", "--no-install-recommends", package]
        if subprocess.run(install, capture_output=True, env=environment).returncode:  # its lists may be old, or none
            subprocess.run([*apt, "update"], capture_output=True, env=environment)
            subprocess.run(install, capture_output=True, env=environment)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on this machine: install Debian's package {package}")
    return found
