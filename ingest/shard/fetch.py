"""Fetches one part into one tar: img2dataset downloads, resizes and encodes, and `ingest.shard.sample_sink` stands in the way.

Only img2dataset's `Downloader` is used, which does one shard: its own Ray distributor drops failed shards.
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
class Fetched:
    """What was stored of one part; not read back yet."""

    tar: Path
    parquet: Path
    urls: int
    """Rows of the part."""


def fetch(
    part: Part,
    work: Path,
    config: IngestConfig,
    hosts: connection.HostPermits | None = None,
    robots: connection.RobotsRules | None = None,
    left_out: Mapping[int, str] | None = None,
) -> Fetched:
    """Download, decode, resize and store the images of a part under `work`, an existing empty folder.

    The tar holds `<key>.<encode_format>`, `<key>.txt` and `<key>.json` in the order of the keys, which are those of
    `roclip.data.shards.sample_key`; the parquet holds the fate of every row. The same answers give the same bytes of
    both, whenever
    and in whichever order they come. From now on this process opens URLs by `ingest.http.connection` only, and while
    this function runs, what it writes to stderr is lost: decoders written in C comment on every other image there.

    Args:
        hosts: Turns at hosts; without, no turn is waited for.
        robots: What sites allow; without, no robots.txt is asked.
        left_out: Row -> why it is not fetched, a text that begins with a name of `roclip.data.outcomes`.

    Raises `ShardError` when img2dataset gives the shard up; a URL that fails is no error.
    """
    img2dataset_shim.bound_decoders(config.policy.max_pixels)
    from ingest.shard.sample_sink import SampleSink  # imports OpenCV, which asks for that bound at once

    rows = Rows(part, config.samples_per_shard, left_out)
    opener = connection.install(
        config.policy, timeout_s=config.timeout_s, retries=config.retries, hosts=hosts, robots=robots
    )
    door = SampleSink(rows, work, config, opener.handled)
    downloader = img2dataset_shim.downloader().Downloader(
        sample_writer_class=lambda *_: door,
        resizer=door,
        thread_count=config.threads,
        save_caption=True,
        extract_exif=False,  # the door does this and the next
        compute_hash=None,
        verify_hash_type=None,
        output_folder=str(work),
        column_list=["url"],
        timeout=config.timeout_s,
        number_sample_per_shard=config.samples_per_shard,
        oom_shard_count=SHARD_DIGITS,
        encode_format=config.encode_format,
        retries=0,  # the opener tries again, and it knows when that is of use
        user_agent_token=None,
        disallowed_header_directives=None,  # the opener judges before the body is read
    )
    feather = work / "urls.feather"
    pyarrow.feather.write_feather(rows.urls(), str(feather), compression="uncompressed")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), _silent_decoders():
        done, _ = downloader((part.number, str(feather)))
    if not done:
        said = printed.getvalue().strip().splitlines()
        raise ShardError(
            f"shard {part.number}: img2dataset gave up ({said[-1] if said else 'it said nothing'}). "
            "Look at free disk space and memory; running ingest again redoes this shard."
        )
    return Fetched(door.tar, door.parquet, len(rows))


@contextlib.contextmanager
def _silent_decoders() -> Iterator[None]:
    """Inside, file descriptor 2 leads nowhere: libpng and libjpeg write there and cannot be told not to."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
