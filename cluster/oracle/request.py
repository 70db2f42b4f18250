"""What a user asks the oracle to judge, from the command line to the job's tasks. Imports nothing heavy."""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class OracleRequest:
    """A check, or a repair of what it finds; by default of an arm's newest checkpoint on the run's own shards."""

    checkpoint: str = ""
    """A step of the arm (`step-00000500` or its number), or any folder with weights of open_clip; empty is the newest."""
    data: str = ""
    """A folder of shards, ready-made tars (`roclip.data.tar_sources`), a parquet with `data.image_col` and
    `data.caption_col`, or a folder of images with a txt of the same name beside each; empty is the run's shards."""
    truth: Path | None = None
    """Parquet with the keys of the poisoned samples, to measure the named victims. A sample of a parquet or a folder has the
    key that ingest gives to the row of a list (`roclip.data.shards.sample_key` with `ingest.samples_per_shard`)."""
    out: Path | None = None
    """Folder of the report; None is `<run>/<arm>/oracle`, `oracle-<step>` for a named step, `oracle-data` for other data."""
    in_process: bool = False
    """Whether to work in this process, without Ray."""

    @property
    def of_newest(self) -> bool:
        """Whether it is the arm's newest checkpoint on its own data, so that a verdict moves TRUSTED."""
        return not self.checkpoint and not self.data


NEWEST = OracleRequest()


def is_step(arm: Path, name: str) -> bool:
    """Whether `name` is a step (`step-00000500` or 500) of which the arm in folder `arm` has a checkpoint."""
    return re.fullmatch(r"\d+|step-\d+", name) is not None and step_folder(arm / "checkpoints", name).is_dir()


def step_folder(checkpoints: Path, name: str) -> Path:
    """Folder of the checkpoint of a step."""
    return checkpoints / (f"step-{int(name):08d}" if name.isdecimal() else name)
