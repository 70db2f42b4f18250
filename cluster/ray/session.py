"""The session of a command: a locked run directory, a display, Ray when it is needed, and a record of the cost."""

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import ray
import ray.exceptions
from ray.job_config import JobConfig

from cluster.display import Display
from cluster.monitoring.publisher import job_config
from cluster.ray.connect import ensure_token, reach, start_local_ray
from roclip.config import Config, dump_config, environment_defaults, identity, model_file, parse_config, run_directory
from roclip.config.cluster import OBJECT_STORE_BYTES
from roclip.config.secrets import private_directory
from roclip.data.tar_sources import shards_root
from roclip.errors import ConfigError, RunLockedError, StageError
from roclip.storage import write_atomic

PACKAGES = ("torch", "deepspeed", "open_clip_torch", "ray", "img2dataset", "webdataset", "faiss-gpu", "faiss-cpu")
_SAMPLE_EVERY_S = 10.0


class Session:
    """One process's work on one run directory."""

    def __init__(self, config: Config, path: Path, display: Display):
        self.config, self.path, self.display = config, path, display
        self.shards = shards_root(config.data.shards, path)
        self.provenance = _provenance()
        self._cost_file = path / "cost.json"
        before = json.loads(self._cost_file.read_text()) if self._cost_file.exists() else {}
        self._wall_before_s: float = before.get("wall_s", 0.0)
        self._peak_bytes: int = before.get("peak_rss_bytes", 0)
        self._started_s = time.monotonic()
        self._halt = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="cost", daemon=True)

    @property
    def cost(self) -> dict:
        """`wall_s` over all commands on this run, and `peak_rss_bytes`: the most memory that this process and all its
        children used at one time, with shared pages counted once."""
        wall_s = self._wall_before_s + time.monotonic() - self._started_s
        return {"wall_s": round(wall_s, 1), "peak_rss_bytes": self._peak_bytes}

    def need_ray(self) -> None:
        """Connect to Ray, or start one on loopback, unless that is already done."""
        if ray.is_initialized():
            return
        cluster, job = self.config.cluster, job_config(self.config, self.path, self.provenance["commit"])
        ensure_token()
        if cluster.address != "local":
            self._join(cluster.address, job)
            return
        training = cluster.workers * cluster.cpus_per_worker
        fetching = self.config.ingest.max_in_flight * cluster.cpus_per_ingest_task
        start_local_ray(
            job_config=job,
            num_cpus=max(os.cpu_count() or 1, int(training + fetching + 1)),
            include_dashboard=cluster.dashboard,
            dashboard_host="127.0.0.1",
            object_store_memory=OBJECT_STORE_BYTES,
        )

    def _join(self, address: str, job: JobConfig) -> None:
        if address != "auto":  # with `auto` this driver, too, takes the Ray that was last started on its node
            job.set_runtime_env({"env_vars": {"RAY_ADDRESS": address}})
        try:
            reach(address)
            ray.init(address=address, job_config=job, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ray.exceptions.RayError) as error:
            raise StageError(
                f"cluster.address: expected a Ray cluster at {address}, got: {str(error).strip().splitlines()[0]} "
                "Is its head up (`ray status`), is this one of its nodes, and is its token here (RAY_AUTH_TOKEN_PATH)? "
                "From outside use `roclip submit`."
            ) from error

    def note_cost(self) -> None:
        """Write `cost.json`, so that a killed run's time is not forgotten. A full disk raises nothing here: that would
        hide the error that it caused elsewhere."""
        with contextlib.suppress(OSError):
            write_atomic(self._cost_file, json.dumps(self.cost))

    def _sample(self) -> None:
        while not self._halt.wait(_SAMPLE_EVERY_S):
            self._peak_bytes = max(self._peak_bytes, _memory_bytes())
            self.note_cost()

    def __enter__(self) -> "Session":
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._halt.set()
        self._sampler.join()
        self.note_cost()


@contextlib.contextmanager
def session(config: Config, *, resumes: bool = True) -> Iterator[Session]:
    """Lock the run directory and work in it.

    Args:
        resumes: The command goes on with a run, so the config must be the one that the run began with; a command that
            only reads a run may differ (`evaluate.classes=…`).

    Raises:
        RunLockedError: another process works in it.
        ConfigError: the directory belongs to another config.
    """
    environment_defaults()
    path = run_directory(config)
    private_directory(path)
    with (path / "run.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise RunLockedError(
                f"{path}: process {lock.read().strip() or 'unknown'} works in this run directory. "
                "Wait for it, stop it, or name another one with run_dir=…"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        if resumes or not (path / "config.yaml").exists():
            keep_config(config, path)
        with Display() as display, Session(config, path, display) as here:
            write_atomic(path / "provenance.json", json.dumps(here.provenance, indent=1))
            display.say(f"run      {path}")
            try:
                yield here
            finally:
                ray.shutdown()


def keep_config(config: Config, path: Path) -> None:
    """Write a directory's `config.yaml` once. Raises `ConfigError` if the directory began with another config."""
    file = path / "config.yaml"
    if not file.exists():
        private_directory(path)
        if (model := model_file(config)) is not None:
            write_atomic(path / "models" / model.name, model.read_text())
        write_atomic(file, dump_config(config))
        return
    before, now = identity(parse_config(file.read_text())).splitlines(), identity(config).splitlines()
    changed = [f"{a.strip()} -> {b.strip()}" for a, b in zip(before, now, strict=False) if a != b]
    if changed or len(before) != len(now):
        raise ConfigError(
            f"{path}: this run began with another config ({'; '.join(changed[:5])}). Its stages would not fit "
            "together: take the change back, or name a new directory with run_dir=…"
        )


def commit() -> str:
    """The commit of the running code, or `unknown`."""
    return _git("rev-parse", "HEAD") or "unknown"


def _provenance() -> dict:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": versions,
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
    }


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    try:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _memory_bytes() -> int:
    """Proportional set size of this process and all its descendants."""
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            full = process.memory_full_info()
            total += getattr(full, "pss", full.rss)
    return total
