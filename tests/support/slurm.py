"""A real Slurm of three nodes on this machine: munged, slurmctld and three slurmd, on ports of its own."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from debian import program
from kit import free_port

PACKAGES = {"slurm-client": "sbatch", "slurmctld": "slurmctld", "slurmd": "slurmd", "munge": "munged"}
_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
ReturnToService=2
MessageTimeout=100
BatchStartTimeout=100
UnkillableStepTimeout=300
KillWait=60
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def need() -> None:
    """Skips the test where there can be no Slurm."""
    if os.geteuid():
        pytest.skip("a Slurm of one's own needs root")
    for package, name in PACKAGES.items():
        program(name, package)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which sbatch, squeue and scancel reach it. `folder` must have a short path."""
    nodes = [
        f"NodeName=n{number} NodeHostname={os.uname().nodename} NodeAddr=127.0.0.1 Port={free_port()} CPUs=8 "
        "RealMemory=64000 State=UNKNOWN"
        for number in (1, 2, 3)
    ]
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(folder=folder, ports=[free_port()], nodes="\n".join(nodes)))
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(conf)}
    munge = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "pid-file", "log-file", "seed-file")
    ]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.sock", "--num-threads=2", *munge],
        ["slurmctld", "-D", "-f", str(conf)],
        *(["slurmd", "-D", "-N", f"n{number}", "-f", str(conf)] for number in (1, 2, 3)),
    ]
    munge_pid = folder / "munge.pid"
    with contextlib.ExitStack() as stack:
        for command in commands:
            out = stack.enter_context((folder / f"{command[0]}.out").open("a"))
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
            stack.callback(_end, process)
            until(munge_pid.exists, 30)
        until(lambda: _said(environment, "sinfo", "-h", "-o", "%T %D").split() == ["idle", "3"], 60)
        stack.callback(_cancel, environment)
        yield environment


def until(holds, seconds: float) -> None:
    """Wait for something; raises `TimeoutError`."""
    deadline_s = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.2)


def states(environment: dict[str, str]) -> set[str]:
    """States of the jobs that have not ended."""
    return set(_said(environment, "squeue", "-h", "-o", "%T").split())


def _said(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, env=environment).stdout


def _cancel(environment: dict[str, str]) -> None:
    _said(environment, "scancel", "--user=root")
    with contextlib.suppress(TimeoutError):
        until(lambda: not states(environment), 120)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
