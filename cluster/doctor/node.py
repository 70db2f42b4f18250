"""The checks that one node of a cluster makes on itself for `roclip doctor --cluster`. Without Ray: an actor is made of it."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.doctor.checks import Check, judge, names_check, nearest_folder
from cluster.doctor.dns import HostSample
from cluster.plan import human_bytes
from cluster.ray.connect import token_file
from cluster.ray.network import interface_of
from roclip.config import FetchPolicy
from roclip.storage import content_of, drop, place, write_atomic, written_beside

PACKAGES = ("torch", "ray", "deepspeed", "open_clip_torch", "faiss-gpu", "faiss-cpu", "webdataset", "img2dataset")
MIN_OPEN_FILES, RECOMMENDED_OPEN_FILES = 4096, 65536
"""Open files: Ray warns below the first, and recommends about the second on nodes with many workers."""
MAX_DISK_USED_FRAC = 0.95
"""Ray creates no objects on a fuller disk."""
DOCKER_SHM_BYTES = 64 * 2**20
"""Docker's default size of /dev/shm, too small for NCCL and data loaders."""
_TIMED_RUNS = 5
_GPU_PROBE_BYTES = 256 * 2**20
_LOOPBACK = ("127.", "::1", "localhost")


@dataclass(frozen=True)
class Node:
    """What the cluster reports of a node, and what a config needs of it."""

    address: str
    session: str
    """Ray's folder for this session."""
    object_store_bytes: int
    gpus: int
    run_directory: str = ""
    """Empty without a config."""
    disk_bytes: int = 0
    """For the run."""


@dataclass(frozen=True)
class Rank:
    """One process of an all-reduce."""

    rank: int
    world: int
    init_address: str
    """`address:port` at rank 0."""
    address: str
    """Address of this rank's node: gloo uses the interface that has it, as in training."""
    gpu: int | None
    """Its index on the node, for NCCL; None for gloo."""
    network: Mapping[str, str]
    """Settings such as NCCL_SOCKET_IFNAME, which training's driver passes on, too."""


class NodeExam:
    """Examines the node that it runs on. Files that it writes are deleted by `clear`."""

    def versions(self) -> dict[str, str]:
        """Versions of Python and of the packages that must agree, and a digest of roclip's own source."""
        found = {"python": platform.python_version()}
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return {**found, "roclip": source_digest()}

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def inspect(self, node: Node) -> list[Check]:
        """All checks that need no other node."""
        return [_disk(node), _shared_memory(node), _open_files(), _interface(node), _token(), gpu_check(node.gpus)]

    def names(self, hosts: HostSample, rules: FetchPolicy) -> Check:
        """Check the rate of DNS lookups."""
        return names_check(hosts, rules)

    def nearest_folder(self, folder: str) -> str:
        """The nearest existing folder at or above a path."""
        return str(nearest_folder(Path(folder)))

    def write(self, where: str, name: str) -> dict[str, float] | str:
        """Seconds to write, rename and read a small file in a folder or store; or the error as text."""
        try:
            return _written(place(where) / name, name.encode())
        except Exception as error:  # every store raises its own errors
            return f"{where}: {type(error).__name__}: {error}"

    def wait_for_files(self, where: str, names: Sequence[str], wait_s: float) -> tuple[float, list[str]]:
        """Wait for files of other nodes, at most `wait_s`. Returns the seconds it took, and the files that are missing."""
        start_s, missing = time.monotonic(), list(names)
        while True:
            missing = [name for name in missing if not _is_there(place(where) / name, name.encode())]
            passed_s = time.monotonic() - start_s
            if not missing or passed_s > wait_s:
                return passed_s, missing
            time.sleep(0.1)

    def clear(self, where: str, names: Sequence[str]) -> None:
        """Delete files of `write`."""
        for name in names:
            with contextlib.suppress(Exception):  # if the store fails, it has been reported before
                drop(place(where) / name)

    def dashboard(self, url: str) -> tuple[list[str], bool | None]:
        """Addresses that this node's dashboard listens on, and whether it asks for a token; None if it does not answer."""
        port = int(url.rsplit(":", 1)[1])
        connections = psutil.net_connections("tcp")
        listening: list[Any] = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
        bound = sorted({address.ip for address in listening if address.port == port})
        try:
            with urllib.request.urlopen(f"http://{url}/api/jobs/", timeout=10):
                return bound, False
        except urllib.error.HTTPError as error:
            return bound, error.code in (401, 403)
        except OSError:
            return bound, None

    def free_port(self) -> int:
        """A port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def all_reduce(self, rank: Rank, size: int, wait_s: float) -> float | str:
        """Median seconds of a sum of `size` bytes over all ranks, or the error as text."""
        import torch
        import torch.distributed as dist

        os.environ.update(rank.network)
        if interface := interface_of(rank.address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        device = torch.device("cpu" if rank.gpu is None else f"cuda:{rank.gpu}")
        world = rank.world
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group(
                "gloo" if rank.gpu is None else "nccl",
                init_method=f"tcp://{rank.init_address}",
                rank=rank.rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=wait_s),
                device_id=device if device.type == "cuda" else None,
            )
            durations = []
            for _ in range(1 + _TIMED_RUNS):  # the first makes the connections
                value = torch.full((size // 4,), float(rank.rank), device=device)
                dist.barrier()
                start_s = time.perf_counter()
                dist.all_reduce(value)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                durations.append(time.perf_counter() - start_s)
                total = value.amin().item(), value.amax().item()
                if total != (want := (world * (world - 1) / 2,) * 2):
                    return f"a sum of {total}, not {want}"
            return sorted(durations[1:])[_TIMED_RUNS // 2]
        except (RuntimeError, ValueError) as error:
            return (str(error).strip().splitlines() or [type(error).__name__])[0]
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def source_digest() -> str:
    """A digest of this project's Python files, as imported here."""
    total = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for package in ("cluster", "ingest", "roclip"):
        for path in sorted((root / package).rglob("*.py")):
            total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:12]


def gpu_check(need: int) -> Check:
    """Whether each GPU that Ray counts on has free memory, multiplies correctly and reports no memory error."""
    if not need and shutil.which("nvidia-smi") is None:
        return Check("gpus", "ok", "none", "none")
    import torch

    seen = torch.cuda.device_count()
    wrong = [] if seen >= need else [f"torch sees {seen}"]
    wrong += [f"GPU {index}: {what}" for index in range(seen) if (what := _gpu_fault(index))] + _memory_errors()
    got = "; ".join(wrong) or (f"{seen} of {torch.cuda.get_device_name(0)}" if seen else "none")
    advice = "Check `nvidia-smi -q`: end what holds the memory, reset or drain a GPU with errors, or fix the driver."
    return judge("gpus", not wrong, got, f"{need} that work", advice)


def _gpu_fault(index: int) -> str:
    """What is wrong with a GPU, or "". Products of small integers are exact in every precision that a GPU multiplies in."""
    import torch

    try:
        free, _ = torch.cuda.mem_get_info(index)
        if free < _GPU_PROBE_BYTES:
            return f"{human_bytes(free)} free"
        factor = torch.randint(-7, 8, (1024, 1024)).float()
        got = (factor.to(f"cuda:{index}") @ factor.T.to(f"cuda:{index}")).cpu()
        return "" if torch.equal(got, factor @ factor.T) else "a wrong matrix product"
    except RuntimeError as error:
        return str(error).splitlines()[0]


def _memory_errors() -> list[str]:
    """Uncorrected memory errors, rows that could not be remapped, and the driver's last Xid, as far as they can be read."""
    volatile = _lines("nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader")
    remapped = _lines("nvidia-smi", "--query-remapped-rows=gpu_bus_id,remapped_rows.failure", "--format=csv,noheader")
    wrong = [f"GPU {line}: uncorrected memory errors" for line in volatile if _counts(line)]
    wrong += [f"GPU {line}: rows not remapped" for line in remapped if _counts(line)]
    return wrong + [line for line in _lines("dmesg") if "NVRM: Xid" in line][-1:]


def _counts(line: str) -> bool:
    value = line.rpartition(",")[2].strip()
    return value.lower() == "yes" or (value.isdigit() and int(value) > 0)


def _lines(*program: str) -> list[str]:
    try:
        done = subprocess.run(program, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _disk(node: Node) -> Check:
    """Checks the disks of Ray's folder, temporary files and runs: reports those that are too full, else the fullest."""
    need = {node.session: 0, tempfile.gettempdir(): 0, node.run_directory: node.disk_bytes}
    usage = {folder: shutil.disk_usage(nearest_folder(Path(folder))) for folder in need if folder}
    full = [folder for folder, u in usage.items() if u.free < need[folder] or u.used > MAX_DISK_USED_FRAC * u.total]
    shown = full or [min(usage, key=lambda folder: usage[folder].free)]
    got = "; ".join(f"{human_bytes(usage[folder].free)} free in {folder}" for folder in shown)
    advice = "Free some space, or set `runs` or Ray's --temp-dir to another disk."
    return judge("disk", not full, got, f"5 %, and {human_bytes(node.disk_bytes)} for the run", advice)


def _shared_memory(node: Node) -> Check:
    usage = shutil.disk_usage("/dev/shm")
    got = f"{human_bytes(usage.free)} free of {human_bytes(usage.total)}"
    need = f"{human_bytes(node.object_store_bytes)} for Ray's objects"
    advice = "Enlarge /dev/shm (docker run --shm-size, a Kubernetes emptyDir of medium Memory)"
    if usage.free < DOCKER_SHM_BYTES:
        return Check("shared memory", "fail", got, need, f"{advice}: NCCL and data loaders need it.")
    enough = usage.total >= node.object_store_bytes
    return judge("shared memory", enough, got, need, f"{advice}, or Ray uses files, which is slow.", otherwise="warn")


def _open_files() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= RECOMMENDED_OPEN_FILES
    advice = f"Run `ulimit -n {RECOMMENDED_OPEN_FILES}` (systemd: LimitNOFILE=) before `ray start` on that node."
    otherwise = "warn" if soft >= MIN_OPEN_FILES else "fail"
    return judge("open files", enough, f"{soft}", f"{RECOMMENDED_OPEN_FILES}", advice, otherwise=otherwise)


def _interface(node: Node) -> Check:
    name, need = interface_of(node.address), "one that the other nodes reach"
    if not name:
        known = ", ".join(
            entry.address for entries in psutil.net_if_addrs().values() for entry in entries if _is_ip4(entry)
        )
        advice = f"Start Ray there with --node-ip-address set to one of {known}."
        return Check("interface", "warn", f"none has {node.address}", need, advice)
    speed = psutil.net_if_stats()[name].speed
    return Check("interface", "ok", f"{name} {node.address}" + f", {speed} Mb/s" * bool(speed), need)


def _is_ip4(entry: Any) -> bool:
    return entry.family == socket.AF_INET and not is_loopback(entry.address)


def is_loopback(address: str) -> bool:
    return address.startswith(_LOOPBACK)


def _token() -> Check:
    """Whether Ray asks for a token, and whether only this user can read it."""
    on = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    path = token_file()
    mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else None
    got = ("asked for" if on else "not asked for") + (f", {path} {mode:04o}" if mode is not None else "")
    need = "a token, file 0600"
    if on and mode is not None and mode & 0o077:
        return Check("token", "fail", got, need, f"Run `chmod 600 {path}` on that node.")
    advice = "Start every node with RAY_AUTH_MODE=token and one token: without it whoever reaches Ray's ports runs code here."
    return judge("token", on, got, need, advice, otherwise="warn")


def _written(path: Path, content: bytes) -> dict[str, float]:
    """Seconds of each step that a checkpoint or a shard goes through."""
    durations, start_s = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start_s
        durations[name] = time.perf_counter() - start_s
        start_s = time.perf_counter()

    if isinstance(path, Path):
        temporary = written_beside(path, content)
        lap("write")
        os.replace(temporary, path)
        lap("rename")
    else:  # a store writes objects atomically
        write_atomic(path, content)
        lap("write")
    if content_of(path) != content:
        raise OSError("other content was read than was written")
    lap("read")
    return durations


def _is_there(path: Path, content: bytes) -> bool:
    try:
        return content_of(path) == content
    except Exception:  # every store raises its own errors
        return False
