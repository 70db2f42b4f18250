"""Fetches one part into one tar with img2dataset. The only file that imports img2dataset.

Only img2dataset's `Downloader` is used, which does one shard: its own Ray distributor drops failed shards.
Its package imports torch (through webdataset) and Ray where it finds them and does without where it does not.
A fetching process needs neither, so they are hidden for the moment of the import: 180 MB instead of more than
400, and 4 s less.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.feather

from ingest import connection, policy
from ingest.sources import Part
from roclip.config import IngestConfig, environment_defaults
from roclip.errors import ShardError
from roclip.shards import SHARD_DIGITS

USER_AGENT_TOKEN = "roclip"
OPT_OUT = ("noai", "noimageai", "noindex", "noimageindex")
"""X-Robots-Tag directives by which a site asks not to be in such a data set."""


@dataclass(frozen=True)
class Fetched:
    """What img2dataset wrote for one part; nothing of it has been checked."""

    tar: Path
    parquet: Path
    urls: int
    """Rows of the part."""


def fetch(part: Part, work: Path, config: IngestConfig) -> Fetched:
    """Download, decode, resize and store the images of a part under `work`, an existing empty folder.

    The tar holds `<key>.<encode_format>`, `<key>.txt` and `<key>.json` in the order in which the answers
    came, with the keys of `roclip.shards.sample_key`; the parquet holds the fate of every row. From now on
    this process opens URLs by `ingest.policy` only. Raises `ShardError` when img2dataset gives the shard up;
    a URL that fails is no error.
    """
    opener = connection.install(config.policy, timeout_s=config.timeout_s, retries=config.retries)
    downloader_class, resizer_class, writer_class = _img2dataset()
    resizer = resizer_class(
        image_size=config.image_size,
        resize_mode=config.resize_mode,
        resize_only_if_bigger=False,
        encode_quality=config.encode_quality,
        encode_format=config.encode_format,
    )
    downloader = downloader_class(
        sample_writer_class=writer_class,
        resizer=_handing_back(resizer, opener),
        thread_count=config.threads,
        save_caption=True,
        extract_exif=False,
        output_folder=str(work),
        column_list=part.table.column_names,
        timeout=config.timeout_s,
        number_sample_per_shard=config.samples_per_shard,
        oom_shard_count=SHARD_DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=config.encode_format,
        retries=0,  # the opener's business
        user_agent_token=USER_AGENT_TOKEN,
        disallowed_header_directives=list(OPT_OUT),
    )
    feather = work / "urls.feather"
    pyarrow.feather.write_feather(part.table, str(feather), compression="uncompressed")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        done, _ = downloader((part.number, str(feather)))
    if not done:
        said = printed.getvalue().strip().splitlines()
        raise ShardError(
            f"shard {part.number}: img2dataset gave up ({said[-1] if said else 'it said nothing'}). "
            "Look at free disk space and memory; running ingest again redoes this shard."
        )
    stem = work / f"{part.number:0{SHARD_DIGITS}d}"
    return Fetched(stem.with_suffix(".tar"), stem.with_suffix(".parquet"), len(part.table))


def _handing_back(resizer: Callable, opener: connection.Opener) -> Callable:
    def resize(stream: io.BytesIO, boxes: list | None) -> tuple:
        try:
            return resizer(stream, boxes)
        finally:
            opener.handled(stream.getbuffer().nbytes)

    return resize


def _img2dataset() -> tuple[type, type, type]:
    environment_defaults()
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(policy.MAX_PIXELS))  # OpenCV reads it once, at import
    with _hidden("torch", "ray", "faiss", "deepspeed"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports imghdr
        from img2dataset.downloader import Downloader
        from img2dataset.resizer import Resizer
        from img2dataset.writer import WebDatasetSampleWriter
    return Downloader, Resizer, WebDatasetSampleWriter


@contextlib.contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Inside, importing one of these packages fails, unless this process has it already."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None means: do not look for it
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
