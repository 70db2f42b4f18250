"""How URLs are fetched and become shards, and what may be fetched."""

import ipaddress
from dataclasses import dataclass, field
from typing import Literal

from roclip.config.strict import positive
from roclip.errors import ConfigError


@dataclass(frozen=True)
class FetchPolicy:
    """What may be fetched, and how politely. Enforced where the connection is made (`ingest/http/policy.py`)."""

    allow_networks: tuple[str, ...] = ()
    """Networks that may be connected to although they are not public, such as 127.0.0.0/8."""
    allow_hosts: tuple[str, ...] = ()
    """Fetch from these domains and their subdomains only; empty is all. `@FILE` reads a file with one domain a line."""
    deny_hosts: tuple[str, ...] = ()
    """Never fetch from these domains and their subdomains. `@FILE` reads a file with one domain a line."""
    deadline_s: float = 30.0
    """Seconds that one URL may take, from its first DNS lookup to its last byte, redirects included."""
    max_bytes: int = 32 * 2**20
    """Largest body of an answer in bytes, both as sent and decompressed."""
    max_redirects: int = 5
    """Redirects that are followed for one URL."""
    max_pixels: int = 64 * 2**20
    """Pixels of the largest image that is decoded; an image's header is read first."""
    animated: Literal["first", "refuse"] = "first"
    """What to do with an image of several frames: take its `first`, or `refuse` it."""
    robots: bool = True
    """Obey robots.txt (RFC 9309)."""
    opt_out: bool = True
    """Obey X-Robots-Tag: noai, noimageai, noml, noindex, noimageindex."""
    contact: str = ""
    """URL or mail address in the User-Agent, so that the owner of a site can reach you."""
    host_connections: int = 4
    """Concurrent requests to one host, over the whole cluster."""
    host_requests_per_s: float = 10.0
    """Requests a second to one host, over the whole cluster."""
    host_rates: tuple[str, ...] = ()
    """Domains with a limit of their own, in requests a second, such as `cdn.example.com=500`; concurrent requests scale with
    it."""
    nameservers: tuple[str, ...] = ()
    """DNS servers to ask instead of the system's resolver, as `address` or `address:port`."""
    proxy: str = ""
    """HTTP proxy for all requests, such as http://egress:3128; it is asked for the address that was checked here."""

    def __post_init__(self) -> None:
        keys = ("deadline_s", "max_bytes", "max_pixels", "host_connections", "host_requests_per_s")
        positive(self, "ingest.policy", *keys)
        for entry in self.host_rates:
            _, _, rate = entry.rpartition("=")
            if not rate.replace(".", "", 1).isdigit() or float(rate) <= 0 or not entry.rpartition("=")[0]:
                raise ConfigError(f"ingest.policy.host_rates: expected domain=requests a second, got {entry!r}.")
        for network in self.allow_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ConfigError(
                    f"ingest.policy.allow_networks: expected networks such as 127.0.0.0/8, got {network!r} ({error})."
                ) from error

    @property
    def rates(self) -> tuple[tuple[str, float], ...]:
        """`host_rates` as (domain, requests a second)."""
        return tuple((entry.rpartition("=")[0].lower(), float(entry.rpartition("=")[2])) for entry in self.host_rates)


@dataclass(frozen=True)
class IngestConfig:
    """How URLs become shards. Names and meanings follow img2dataset."""

    samples_per_shard: int = 10_000
    """Number of URLs that become one shard."""
    image_size: int = 256
    """Side of the stored images, in pixels."""
    resize_mode: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = "border"
    """How an image gets `image_size`: not at all, with a border, by its shorter or its longer side, or by cutting its centre."""
    resize_only_if_bigger: bool = False
    """Leave images that are smaller than `image_size` as they are."""
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    """Format of the stored images."""
    encode_quality: int = 95
    """Quality of JPEG and WebP, up to 100; for PNG the compression level, 0 to 9."""
    skip_reencode: bool = False
    """Keep the fetched bytes of an image that already has `encode_format` and the right size."""
    min_image_size: int = 0
    """Pixels that the shorter side of an image must have."""
    max_aspect_ratio: float = 0.0
    """Largest ratio of the longer side to the shorter; 0 allows any."""
    extract_exif: bool = True
    """Store an image's EXIF data in its json."""
    columns: tuple[str, ...] = ()
    """Further columns of the list to copy into each sample's json and the shard's parquet."""
    hash_check: Literal["off", "strict", "warn", "perceptual"] = "warn"
    """What to do with an image that differs from the list's columns md5, sha256 or phash: `strict` drops it, `warn` keeps and
    flags it, `perceptual` drops it unless it looks the same."""
    threads: int = 32
    """Concurrent downloads in one task."""
    timeout_s: float = 10.0
    """Seconds to wait for a server's next byte."""
    retries: int = 1
    """Immediate retries of a URL after a failure that may pass."""
    retry_passes: int = 1
    """Passes, after the whole list, over the URLs that failed in a way that may pass; they fill new shards."""
    max_in_flight: int = 2
    """Largest number of shards that are fetched at the same time; fewer while memory is short or tasks fail."""
    shard_retries: int = 2
    """Retries of a shard whose task failed, before the rows that kill the task are searched for and left out."""
    quarantine: tuple[str, ...] = ()
    """Signals of `suspicion.parquet` whose samples are withheld from training; they stay readable. Training can then start
    only when the whole list is fetched."""
    compare_with: str = ""
    """Shards of an earlier ingest of the same list, to report what has changed since."""
    policy: FetchPolicy = field(default_factory=FetchPolicy)

    def __post_init__(self) -> None:
        positive(self, "ingest", "samples_per_shard", "image_size", "threads", "timeout_s", "max_in_flight")
        if self.encode_format == "png" and not 0 <= self.encode_quality <= 9:
            raise ConfigError(
                f"ingest.encode_quality: expected 0 to 9 for png (compression), got {self.encode_quality}. Set 6."
            )
