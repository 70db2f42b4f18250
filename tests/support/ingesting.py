"""Small real ingests: a corpus for the origin, a config, and what the shards must be in the end."""

import functools
import io
import json
import os
import signal
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from kit import REPOSITORY
from PIL import Image

from cluster.ingest import job
from ingest.folder.lease import Lease
from roclip.config import ClusterConfig, Config, DataConfig, FetchPolicy, IngestConfig
from roclip.data.shards import Manifest, index_path, sample_key
from roclip.errors import RunLockedError
from roclip.storage import place, sha256_file

PER_SHARD = 20
GOOD = ("ok", "redirect", "slow")
DEADLY = b"deadly-for-the-decoder"
KILLER = Path(__file__).parent / "killer"
"""Its `sitecustomize` dies of DEADLY."""
WORKERS = {"env_vars": {"PYTHONPATH": os.pathsep.join((str(KILLER), str(REPOSITORY)))}}
"""Runtime environment of the workers."""


def config(per_shard=PER_SHARD, max_bad_frac=0.3, resource="", **ingest):
    """An ingest of 32 px images over loopback."""
    open_door = FetchPolicy(
        allow_networks=("127.0.0.0/8",), robots=False, host_requests_per_s=1e6, host_connections=256
    )
    settings = {"max_in_flight": 2, "shard_retries": 2, "retry_passes": 0, **ingest}
    return Config(
        data=DataConfig(images="embedded", max_bad_frac=max_bad_frac),
        ingest=IngestConfig(
            samples_per_shard=per_shard,
            image_size=32,
            threads=8,
            timeout_s=2.5,
            retries=0,
            policy=open_door,
            **settings,
        ),
        cluster=ClusterConfig(cpus_per_ingest_task=0.5, ingest_resource=resource),
    )


def write_corpus(path, behaviours, deadly=()):
    """A corpus for the origin, with a picture of its own for each row."""
    images = []
    for row in range(len(behaviours)):
        pixels = np.random.default_rng(row).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        images.append(buffer.getvalue() + DEADLY * (row in deadly))
    columns = {
        "path": [f"/{row}.jpg" for row in range(len(behaviours))],
        "image": images,
        "caption": [f"caption {row}" for row in range(len(behaviours))],
        "behaviour": behaviours,
    }
    pq.write_table(pa.table(columns), path)
    return path


def sealed_captions(root):
    """Caption of every sample of the sealed shards, whose files must be what the manifest says they are."""
    captions = []
    for record in Manifest(root).records():
        assert sha256_file(root / record.name) == record.sha256
        assert sha256_file(index_path(root, record.name)) == record.index_sha256
        index = pq.read_table(index_path(root, record.name))
        assert record.samples == len(index)
        assert record.urls == record.samples + sum(record.failed.values())
        tar = (root / record.name).read_bytes()
        for offset, size in zip(index["caption_offset"].to_pylist(), index["caption_size"].to_pylist(), strict=True):
            captions.append(tar[offset : offset + size].decode())
    return captions


def sealed_keys(root):
    """Keys of all samples of the sealed shards."""
    return [
        key
        for record in Manifest(root).records()
        for key in pq.read_table(index_path(root, record.name))["key"].to_pylist()
    ]


def good_captions(behaviours):
    return [f"caption {row}" for row, behaviour in enumerate(behaviours) if behaviour in GOOD]


def good_keys(behaviours, per_shard=PER_SHARD):
    return [sample_key(row, per_shard) for row, behaviour in enumerate(behaviours) if behaviour in GOOD]


def drive(address, settings, urls, root, stores, expiry_s, said):
    """An ingest, for a process of its own: what it returns, or the error that it is locked, is put into `said`."""
    import ray

    job.Lease = functools.partial(Lease, expiry_s=expiry_s)
    if stores:
        fsspec.config.conf["s3"] = stores
    runtime = {"env_vars": {**WORKERS["env_vars"], **({"FSSPEC_S3": json.dumps(stores)} if stores else {})}}
    ray.init(address=address, log_to_driver=False, runtime_env=runtime)
    try:
        said.put(job.ingest(settings, urls, place(str(root))))
    except RunLockedError as error:
        said.put(error)


def hold_lease(root):
    """Hold the lease until this process is killed."""
    with Lease(root):
        signal.pause()
