"""Checks whether this machine has what a config needs. Each check says what it found, what is needed and what to do."""

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.doctor.dns import WHAT_TO_DO, HostSample, first_hosts, measure_names
from cluster.plan import RunPlan, human_bytes, make_plan
from roclip.config import Config, FetchPolicy, run_directory
from roclip.config.cluster import OBJECT_STORE_BYTES
from roclip.errors import RoclipError, StageError
from roclip.storage import place, write_atomic

Status = Literal["ok", "warn", "fail"]
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_WORKER_BYTES = 1_200_000_000
"""Resident size of a process with torch, DeepSpeed and open_clip before it holds a model."""
_RAY_BYTES = 1_000_000_000
"""Ray's own processes and its dashboard."""
_TRAINING_BYTES = 24
"""Bytes per parameter in training: fp32 weight, gradient, two moments, and DeepSpeed's flat copies."""
_CHECKPOINT_BYTES = 12
"""Bytes per parameter of the copy from which rank 0 writes checkpoints: fp32 weight and two moments."""
_OUTSIDE = (
    "torch",
    "open_clip_torch",
    "deepspeed",
    "webdataset",
    "ray",
    "img2dataset",
    "pyarrow",
    "omegaconf",
)


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    status: Status
    got: str
    need: str
    what_to_do: str = ""
    """Empty if nothing is to be done."""


def doctor(config: Config | None) -> list[Check]:
    """Check this machine, against the needs of `config` if given. Leaves nothing behind."""
    checks = [_python(), _packages(), _compiler(), _ninja(), _faiss(), _port()]
    if config is None:
        return [*checks, _cores(None), _memory(None, None), _store(Path("."))]
    checks += [_cores(config), _gpus(config), _store(run_directory(config).parent)]
    try:
        plan = make_plan(config)
    except RoclipError as error:
        return [
            *checks,
            _memory(config, None),
            Check("model", "fail", str(error), "a known name", "Correct model.name."),
        ]
    stores = {
        "data.shards": config.data.shards if config.data.fetches else "",
        "train.checkpoint_store": config.train.checkpoint_store,
    }
    checks += [_object_store(key, where) for key, where in stores.items() if "://" in where]
    if config.data.urls:
        checks.append(_names(config))
    return [*checks, _memory(config, plan), _shared_memory(), _disk(config, plan), _data(plan)]


def _names(config: Config) -> Check:
    try:
        return names_check(first_hosts(config), config.ingest.policy)
    except RoclipError as error:
        return Check("names", "fail", str(error), "a URL list", "Correct data.urls.")


def names_check(hosts: HostSample, rules: FetchPolicy) -> Check:
    """Whether this machine resolves names as fast as its cores could fetch."""
    per_s, needed, missing = measure_names(hosts, rules)
    got = f"{per_s:,.0f} names/s, {missing:.0%} not found"
    return judge(
        "names", per_s >= needed and missing < 0.5, got, f"{needed:,.0f} names/s", WHAT_TO_DO, otherwise="warn"
    )


def exit_code(checks: list[Check]) -> int:
    """7 if a check failed, else 0; warnings do not count."""
    return StageError.exit_code if any(check.status == "fail" for check in checks) else 0


def show_checks(console: Console, checks: list[Check]) -> None:
    """Print the checks as a table, with what to do below it."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "check", "got", "needed"):
        table.add_column(name, overflow="fold")
    for check in checks:
        table.add_row(Text(check.status, _STYLES[check.status]), check.name, Text(check.got), Text(check.need))
    console.print(table)
    for check in checks:
        if check.what_to_do and check.status != "ok":
            line = Text.assemble((f"{check.name}: ", _STYLES[check.status]), check.what_to_do)
            console.print(line, soft_wrap=True, highlight=False)


def judge(name: str, good: bool, got: str, need: str, what_to_do: str, *, otherwise: Status = "fail") -> Check:
    """A check that is ok if `good`, else `otherwise`."""
    return Check(name, "ok" if good else otherwise, got, need, "" if good else what_to_do)


def _python() -> Check:
    version = sys.version_info
    return judge(
        "python",
        (3, 10) <= version[:2] < (3, 13),
        f"{version.major}.{version.minor}.{version.micro}",
        "3.10 to 3.12",
        "Make an environment with Python 3.12; img2dataset needs imghdr, which 3.13 removed.",
    )


def _packages() -> Check:
    """Compare installed versions with the distribution's own requirements."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("roclip") or ()]
    except importlib.metadata.PackageNotFoundError:
        requirements = [Requirement(name) for name in _OUTSIDE]
    found, wrong = 0, []
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        found += 1
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, not {requirement.specifier}")
    got = "; ".join(wrong) or f"{found} as required"
    return judge("packages", not wrong, got, "roclip's requirements", "Run `pip install .` in a checkout.")


def _compiler() -> Check:
    """Compile a program that includes Python's header, as DeepSpeed's and torch's extensions do."""
    command = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    need = "a C++17 compiler with Python's headers"
    advice = "Install g++ and Python's development headers: torch and DeepSpeed compile extensions at first use."
    if command is None:
        return Check("compiler", "fail", "none", need, advice)
    flags = ["-std=c++17", f"-I{sysconfig.get_paths()['include']}", "-fsyntax-only", "-x", "c++", "-"]
    code, output = _command([*command.split(), *flags], "#include <Python.h>\n#include <vector>\nint main() {}\n")
    return judge("compiler", code == 0, command if code == 0 else output, need, advice)


def _ninja() -> Check:
    beside = Path(sys.executable).parent / "ninja"
    found = shutil.which("ninja") or (str(beside) if beside.is_file() else None)
    return judge("ninja", found is not None, found or "none", "ninja", "Run `pip install ninja`.")


def _faiss() -> Check:
    """Import FAISS in a process of its own, which may crash, and find a vector among four."""
    program = (
        "import faiss, numpy as np\n"
        "x = np.eye(4, 8, dtype='float32')\n"
        "_, slots = faiss.knn(x[2:3], x, 1, metric=faiss.METRIC_INNER_PRODUCT)\n"
        "assert slots[0, 0] == 2, slots\n"
        "gpus = faiss.get_num_gpus() if hasattr(faiss, 'get_num_gpus') else 0\n"
        "print(f'{faiss.__version__}, {gpus} GPUs')\n"
    )
    code, output = _command([sys.executable, "-c", program])
    advice = "Reinstall faiss-gpu (Linux x86-64) or faiss-cpu, never both; or set pool.backend=torch."
    return judge("faiss", code == 0, output, "a correct search", advice)


def _port() -> Check:
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            with socket.create_connection(server.getsockname(), timeout=5):
                got, good = "bound and reached one on loopback", True
    except OSError as error:
        got, good = str(error), False
    return judge(
        "ports",
        good,
        got,
        "a free loopback port",
        "Allow loopback connections: Ray and the origin need them.",
    )


def _cores(config: Config | None) -> Check:
    cores = usable_cores()
    if config is None:
        return judge("cores", cores >= 2, f"{cores:g}", "2", "It will be slow.", otherwise="warn")
    if config.cluster.address != "local":
        return Check("cores", "ok", f"{cores:g} here", f"decided by the cluster {config.cluster.address}")
    cluster = config.cluster
    need = cluster.workers * cluster.cpus_per_worker
    both = need + cluster.cpus_per_ingest_task
    if cores < need:
        advice = f"Set cluster.workers={max(1, int(cores // cluster.cpus_per_worker))} or cluster.cpus_per_worker."
        return Check("cores", "fail", f"{cores:g}", f"{need:g} to train", advice)
    return judge(
        "cores",
        cores >= both,
        f"{cores:g}",
        f"{both:g} to train while ingest runs",
        "Training may take turns with ingest.",
        otherwise="warn",
    )


def _memory(config: Config | None, plan: RunPlan | None) -> Check:
    free = usable_memory_bytes()
    if config is None or config.cluster.address != "local":
        return judge("memory", free > 4e9, human_bytes(free), "4.0 GB", "Close other programs.", otherwise="warn")
    model = (plan.parameters or 0) * _TRAINING_BYTES + plan.pool_bytes if plan else 0
    need = _RAY_BYTES + OBJECT_STORE_BYTES + config.cluster.workers * (_WORKER_BYTES + model)
    need += (plan.parameters or 0) * _CHECKPOINT_BYTES if plan else 0
    status: Status = "ok" if free >= need else "warn" if free >= need / 2 else "fail"
    advice = "Lower cluster.workers, pool.size or the model, or close other programs."
    return Check("memory", status, human_bytes(free), f"about {human_bytes(need)}, and the batch's activations", advice)


def _shared_memory() -> Check:
    need, folder = OBJECT_STORE_BYTES, Path("/dev/shm")
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    advice = "Ray will use files instead, which is slow: enlarge /dev/shm."
    return judge("shared memory", free >= need, human_bytes(free), human_bytes(need), advice, otherwise="warn")


def _disk(config: Config, plan: RunPlan) -> Check:
    free, need = shutil.disk_usage(nearest_folder(run_directory(config))).free, plan.disk_bytes
    status: Status = "fail" if free < need else "warn" if free < 1.2 * need else "ok"
    advice = "Free some space, set `runs` to another disk, or lower train.keep_checkpoints."
    return Check("disk", status, f"{human_bytes(free)} free", f"about {human_bytes(need)}", advice)


def _data(plan: RunPlan) -> Check:
    """Whether the data gives at least one step per epoch."""
    if plan.rows is None:
        return Check("data", "fail", plan.problem, "the list or the shards", "Correct the path in the config.")
    got, advice = f"{plan.rows:,} rows, {plan.steps_per_epoch:,} steps an epoch", "Lower train.global_batch_size."
    return judge("data", plan.steps_per_epoch != 0, got, "a step an epoch", advice)


def _gpus(config: Config) -> Check:
    need = config.cluster.workers * config.cluster.gpus_per_worker
    devices = len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
    if need == 0 or config.cluster.address != "local":
        return Check("gpus", "ok", f"{devices} here", "none" if need == 0 else "decided by the cluster")
    code, output = _command([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"])
    seen = int(output) if code == 0 and output.isdigit() else 0
    got = f"{seen} seen by torch, {devices} by the system" if code == 0 else output
    advice = "Check the driver; or set cluster.workers to the GPUs seen, or cluster.gpus_per_worker=0."
    return judge("gpus", seen >= need, got, f"{need:g}", advice)


def _store(folder: Path) -> Check:
    """Write, replace and read a file in the folder of the runs."""
    root = nearest_folder(folder)
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".roclip-doctor-") as scratch:
            probe = Path(scratch, "probe")
            for content in ("one", "two"):
                write_atomic(probe, content)
            good, got = probe.read_text() == "two" and len(list(probe.parent.iterdir())) == 1, f"{root} is"
    except OSError as error:
        good, got = False, str(error)
    need = "writable, with atomic rename"
    return judge("run store", good, got, need, "Set `runs` to a folder that you may write to.")


def _object_store(key: str, where: str) -> Check:
    """Put, read and delete an object."""
    try:
        probe = place(where) / f".roclip-doctor-{os.getpid()}"
        probe.write_bytes(b"one")
        good, got = probe.read_bytes() == b"one", f"{where} is"
        probe.unlink()
    except Exception as error:  # every store raises its own errors
        good, got = False, f"{where}: {type(error).__name__}: {error}"
    advice = f"Set {key} to a place that you may write to; fsspec's settings say with which key."
    return judge(key, good, got, "writable", advice)


def usable_cores() -> float:
    """Cores that this process may use: CPU affinity, and the control group's quota if there is one."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def usable_memory_bytes() -> int:
    """Memory that this process may still use: what is available, and what the control group leaves."""
    available = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return max(0, min(available, limit - used))


def nearest_folder(path: Path) -> Path:
    """The nearest existing folder at or above a path."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _command(arguments: list[str], text: str = "") -> tuple[int, str]:
    """Run a program for at most a minute; returns its exit status and the last line it printed."""
    try:
        done = subprocess.run(arguments, input=text, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    lines = (done.stdout.strip() if done.returncode == 0 else done.stderr.strip()).splitlines()
    return done.returncode, lines[-1] if lines else f"exit status {done.returncode}"
