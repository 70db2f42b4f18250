"""What several tests use: paths, tiny shards, a child's environment."""

import io
import os
import socket
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from roclip.attacks import scenes
from roclip.data.shards import Manifest, ShardRecord, index_path, sample_key
from roclip.storage import sha256_file

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
TINY_MODEL = """{
 "embed_dim": 32,
 "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
 "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
}"""


def write_shard(root: Path, number: int, samples: list[tuple[bytes, str]], samples_per_shard: int = 64) -> ShardRecord:
    """A sealed shard with its index and manifest record, written with nothing but tarfile."""
    root.mkdir(parents=True, exist_ok=True)
    name = f"{number:05d}.tar"
    with tarfile.open(root / name, "w") as tar:
        for position, (image, caption) in enumerate(samples):
            key = sample_key(number * samples_per_shard + position, samples_per_shard)
            for suffix, content in (("png", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    rows: dict[str, list] = {}
    with tarfile.open(root / name) as tar:
        for member in tar:
            key, suffix = member.name.split(".")
            columns = ("image_offset", "image_size") if suffix == "png" else ("caption_offset", "caption_size")
            if suffix == "png":
                rows.setdefault("key", []).append(key)
            rows.setdefault(columns[0], []).append(member.offset_data)
            rows.setdefault(columns[1], []).append(member.size)
    index = index_path(root, name)
    pq.write_table(pa.table(rows), index)
    record = ShardRecord(
        name=name,
        samples=len(samples),
        bytes=(root / name).stat().st_size,
        sha256=sha256_file(root / name),
        index_sha256=sha256_file(index),
        urls=len(samples),
    )
    Manifest(root).publish(record)
    return record


def scene_samples(first: int, number: int, *, seed: int = 0, size_px: int = 64) -> list[tuple[bytes, str]]:
    """Encoded scenes with their captions."""
    rendered = [scenes.render(index, seed=seed, size_px=size_px) for index in range(first, first + number)]
    return [(scenes.encode(scene.image), scene.caption) for scene in rendered]


def tiny_shards(root: Path) -> Path:
    """Three sealed shards of 64 scenes each, ingest ended."""
    for number in range(3):
        write_shard(root, number, scene_samples(64 * number, 64))
    Manifest(root).finish({"urls": 192, "succeeded": 192, "failed": {}, "shards": 3})
    return root


def preset(folder: Path, text: str) -> Path:
    """A preset in `folder` with the model `tiny` beside it."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    (folder / "models" / "tiny.json").write_text(TINY_MODEL)
    path = folder / "preset.yaml"
    path.write_text(text)
    return path


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process: this one's, with the repository importable."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": path, **extra}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
