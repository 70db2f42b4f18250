"""Fetches one part into one tar: img2dataset downloads, resizes and encodes, through `ingest.shard.sample_sink`.

Only img2dataset's `Downloader` is used, which processes one shard: its own Ray distributor drops failed shards.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.feather

from ingest.http import connection
from ingest.lists.sources import Part
from ingest.shard import img2dataset_shim
from ingest.shard.rows import Rows
from roclip.config import IngestConfig
from roclip.data.shards import SHARD_DIGITS
from roclip.errors import ShardError


@dataclass(frozen=True)
class FetchedShard:
    """The files of a fetched part, not yet verified."""

    tar: Path
    parquet: Path
    urls: int
    """Rows of the part."""


def fetch(
    part: Part,
    work: Path,
    config: IngestConfig,
    limiter: connection.HostLimiter | None = None,
    robots: connection.RobotsRules | None = None,
    excluded: Mapping[int, str] | None = None,
) -> FetchedShard:
    """Download, decode, resize and store the images of a part under `work`, an existing empty folder.

    The tar holds `<key>.<encode_format>`, `<key>.txt` and `<key>.json` in the order of the keys, which are those of
    `roclip.data.shards.sample_key`; the parquet holds the outcome of every row. The same responses give the same bytes of both
    files, whenever and in whichever order they arrive. From now on this process opens URLs through `ingest.http.connection`
    only, and while this function runs, its stderr is discarded: decoders written in C write warnings about many images there.

    Args:
        limiter: Rate limiter per host; without one, requests are not limited.
        robots: robots.txt rules; without them, no robots.txt is read.
        excluded: Maps rows that are not fetched to the reason, a text that begins with a name of `roclip.data.outcomes`.

    Raises `ShardError` if img2dataset gives up on the shard; a URL that fails is not an error.
    """
    img2dataset_shim.bound_decoders(config.policy.max_pixels)
    from ingest.shard.sample_sink import SampleSink  # imports OpenCV, which reads that limit at import

    rows = Rows(part, config.samples_per_shard, excluded)
    opener = connection.install(
        config.policy, timeout_s=config.timeout_s, retries=config.retries, limiter=limiter, robots=robots
    )
    sink = SampleSink(rows, work, config, opener.release_body)
    downloader = img2dataset_shim.downloader().Downloader(
        sample_writer_class=lambda *_: sink,
        resizer=sink,
        thread_count=config.threads,
        save_caption=True,
        extract_exif=False,  # the sink does EXIF and hashes
        compute_hash=None,
        verify_hash_type=None,
        output_folder=str(work),
        column_list=["url"],
        timeout=config.timeout_s,
        number_sample_per_shard=config.samples_per_shard,
        oom_shard_count=SHARD_DIGITS,
        encode_format=config.encode_format,
        retries=0,  # the opener retries, and knows which failures are worth it
        user_agent_token=None,
        disallowed_header_directives=None,  # the opener checks them before it reads the body
    )
    feather = work / "urls.feather"
    pyarrow.feather.write_feather(rows.urls(), str(feather), compression="uncompressed")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), _silent_decoders():
        done, _ = downloader((part.number, str(feather)))
    if not done:
        lines = printed.getvalue().strip().splitlines()
        raise ShardError(
            f"shard {part.number}: img2dataset gave up ({lines[-1] if lines else 'without a message'}). "
            "Check free disk space and memory; running ingest again redoes this shard."
        )
    return FetchedShard(sink.tar, sink.parquet, len(rows))


@contextlib.contextmanager
def _silent_decoders() -> Iterator[None]:
    """Redirect file descriptor 2 to nowhere: libpng and libjpeg write there and cannot be configured otherwise."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
