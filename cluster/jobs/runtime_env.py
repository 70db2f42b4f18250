"""The runtime environment of a job: its resolved config and the JSON of its model.

The config is sent with absolute paths: run directory and data must have the same path on every node, or be on a store. The nodes
must have our packages installed.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from roclip.config import Config, dump_config, identity, model_file
from roclip.storage import write_atomic

_PATHS = {
    "data": ("urls", "images", "shards", "cache_dir"),
    "ingest": ("compare_with",),
    "repair": ("triggers", "finetune"),
    "evaluate": ("images", "class_file", "template_file", "webdataset"),
    "oracle": ("label_file", "trusted_file"),
}
_PATHS_OR_NAMES = {"model": ("pretrained",), "augment": ("synonyms",), "oracle": ("weights",)}
"""Values that are paths if such a file or folder exists, and names otherwise."""


def for_cluster(config: Config) -> Config:
    """The config as a job has it: with absolute paths, on the Ray that the job runs on."""
    sections: dict[str, Any] = {}
    for keys, absolute in ((_PATHS, _absolute), (_PATHS_OR_NAMES, _absolute_if_there)):
        for section, names in keys.items():
            now = sections.get(section, getattr(config, section))
            sections[section] = dataclasses.replace(now, **{name: absolute(getattr(now, name)) for name in names})
    attacks = config.attacks
    backdoors = tuple(dataclasses.replace(one, pattern=_absolute_if_there(one.pattern)) for one in attacks.backdoors)
    return dataclasses.replace(
        config,
        **sections,
        attacks=dataclasses.replace(attacks, backdoors=backdoors),
        runs=_absolute(config.runs),
        run_dir=_absolute(config.run_dir),
        cluster=dataclasses.replace(config.cluster, address="auto"),
    )


def identity_digest(config: Config) -> str:
    """Identifies a run, whatever its directory: equal for two configs that are one run, 16 hex digits."""
    return hashlib.sha256(identity(config).encode()).hexdigest()[:16]


def pack(config: Config, folder: Path) -> None:
    """Fill the working directory of a job; the config has the name of its preset."""
    write_atomic(folder / Path(config.source).name, dump_config(dataclasses.replace(config, source="")))
    if (model := model_file(config)) is not None:
        write_atomic(folder / "models" / model.name, model.read_text())


def _absolute(where: str) -> str:
    """Make each of several paths, separated by `::`, absolute; a URL is kept."""
    return "::".join(path if not path or "://" in path else str(Path.cwd() / path) for path in where.split("::"))


def _absolute_if_there(value: str) -> str:
    kind, colon, path = value.rpartition(":")
    return f"{kind}{colon}{Path.cwd() / path}" if path and "//" not in value and Path(path).exists() else value
