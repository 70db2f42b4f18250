"""The script of `roclip render slurm`, on a real Slurm of three nodes: run, stopped before its time ends, queued again."""

import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import slurm
from kit import REPOSITORY, TINY_MODEL
from tiny import TINY_RUN

from cluster.cli.main import guarded

DEPLOY = """
workers_per_node: 1
memory_gib_per_worker: 1
memory_gib_per_ingest_task: 1
shm_gib: 1
ingest_nodes: 1
slurm: {{setup: "export PATH={bin}:$PATH PYTHONPATH={repository}"}}
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.nodes
def test_job_is_stopped_before_its_time_ends_and_queues_again(monkeypatch: pytest.MonkeyPatch):
    slurm.need()
    with tempfile.TemporaryDirectory(prefix="sl") as name, slurm.cluster(Path(name)) as environment:
        monkeypatch.chdir(name)
        folder, job = Path(name), Job(Path(name), environment)
        job.submit()
        job.until((folder / "runs" / "tiny" / "clip" / "checkpoints" / "LATEST").exists)
        token = next(folder.glob(".tiny-*/token"))
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        secret = token.read_text()
        assert len(secret) == 64
        seen = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
        assert "--temp-dir=/tmp/tiny-" in seen
        assert secret not in seen
        job.signal("USR1")  # what Slurm sends when the time is nearly over
        job.until(lambda: "stopped by Ctrl-C" in job.said())
        slurm.until(lambda: "PENDING" in slurm.states(environment), 120)  # Slurm lets it begin after two minutes
        assert secret not in job.said()
        assert not list(folder.glob(".tiny-*"))
        assert not list(Path("/tmp").glob(f"tiny-{job.number}*"))


class Job:
    """The tiny run as a batch job on two nodes that train and one that fetches."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder = folder
        self.environment = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
        (folder / "models").mkdir()
        (folder / "models" / "tiny.json").write_text(TINY_MODEL)
        deploy = DEPLOY.format(bin=Path(sys.executable).parent, repository=REPOSITORY)
        (folder / "tiny.yaml").write_text(TINY_RUN.format(folder="."))
        (folder / "deploy.yaml").write_text(deploy)
        command = [
            "render",
            "slurm",
            "tiny.yaml",
            "arms=[clip]",
            "train.epochs=2",
            "--deploy",
            "deploy.yaml",
            "--out",
            ".",
        ]
        assert guarded(command) == 0

    def submit(self) -> None:
        self._slurm("sbatch", "--test-only", "tiny.sbatch")
        self.number = self._slurm("sbatch", "--parsable", "tiny.sbatch").strip()

    def signal(self, name: str) -> None:
        self._slurm("scancel", "--batch", f"--signal={name}", self.number)

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something while the job is there; fails with its log."""
        slurm.until(lambda: holds() or not slurm.states(self.environment), 400)
        assert holds(), self.said()[-8000:]

    def said(self) -> str:
        return (self.folder / f"tiny-{self.number}.log").read_text()

    def _slurm(self, *command: str) -> str:
        environment = {key: value for key, value in self.environment.items() if not key.startswith("OMP_")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout
