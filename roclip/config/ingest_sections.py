"""The section of a config that fills shards: how URLs are fetched, what may be fetched, what is done with it."""

import ipaddress
from dataclasses import dataclass, field
from typing import Literal

from roclip.config.strict import positive
from roclip.errors import ConfigError


@dataclass(frozen=True)
class FetchPolicy:
    """What may be fetched, and how politely. Enforced where the connection is made (`ingest/http/policy.py`)."""

    allow_networks: tuple[str, ...] = ()
    """Networks that are not public and may be connected to all the same, such as 127.0.0.0/8. Nothing else opens them."""
    allow_hosts: tuple[str, ...] = ()
    """Fetch from these domains and what is below them only; empty is all. `@file` reads one a line."""
    deny_hosts: tuple[str, ...] = ()
    """Never fetch from these domains and what is below them. `@file` reads one a line."""
    deadline_s: float = 30.0
    """Longest time for one URL, from its first lookup to its last byte, redirects included."""
    max_bytes: int = 32 * 2**20
    """Largest body of one answer, as sent and after decompression."""
    max_header_bytes: int = 64 * 2**10
    """Largest head of one answer."""
    max_redirects: int = 5
    max_pixels: int = 64 * 2**20
    """Largest image that is decoded; read from its header before."""
    animated: Literal["first", "refuse"] = "first"
    """What is done with an image of several frames: its first frame is taken, or it is refused."""
    robots: bool = True
    """Obey robots.txt (RFC 9309)."""
    opt_out: bool = True
    """Obey X-Robots-Tag: noai, noimageai, noml, noindex, noimageindex."""
    contact: str = ""
    """URL or mail address for the User-Agent, by which the owner of a site can reach you."""
    host_connections: int = 4
    """Requests to one host at the same time, over the whole cluster."""
    host_requests_per_s: float = 10.0
    """Requests to one host a second, over the whole cluster."""
    host_rates: tuple[str, ...] = ()
    """Domains that take more, such as `cdn.example.com=500`: requests a second, and as many more at the same time."""
    nameservers: tuple[str, ...] = ()
    """DNS servers to ask, as `address` or `address:port`, instead of the system's resolver."""
    dns_lookups: int = 64
    """Lookups at the same time in one process."""
    proxy: str = ""
    """HTTP proxy for all requests, such as http://egress:3128. It is asked for the address that was vetted here."""

    def __post_init__(self) -> None:
        keys = ("deadline_s", "max_bytes", "max_header_bytes", "max_pixels", "host_connections", "host_requests_per_s")
        positive(self, "ingest.policy", *keys, "dns_lookups")
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
    image_size: int = 256
    """Side of the stored images, in pixels."""
    resize_mode: Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"] = "border"
    resize_only_if_bigger: bool = False
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int = 95
    """JPEG and WebP quality; for PNG the compression level 0 to 9."""
    skip_reencode: bool = False
    """Keep the fetched bytes of an image that has `encode_format` and the right size already."""
    min_image_size: int = 0
    """Smallest shorter side, in pixels."""
    max_aspect_ratio: float = 0.0
    """Longer over shorter side; 0 is any."""
    extract_exif: bool = True
    columns: tuple[str, ...] = ()
    """Further columns of the list that go into each sample's json and the shard's parquet."""
    hash_check: Literal["off", "strict", "warn", "perceptual"] = "warn"
    """Where the list has the columns md5, sha256 or phash: drop what differs, keep and flag it, or drop it unless
    the picture looks the same."""
    threads: int = 32
    """Concurrent downloads in one task."""
    timeout_s: float = 10.0
    """Longest wait for a server's next byte."""
    retries: int = 1
    """Further tries of one URL at once, after a failure that may pass."""
    retry_passes: int = 1
    """Further passes over the URLs that failed in a way that may pass, after the list; they fill new shards."""
    max_in_flight: int = 2
    """Shards that are fetched at the same time, at most; fewer while memory is short or tasks fail."""
    shard_retries: int = 2
    """Further tries of one shard whose task failed; then the rows that kill it are looked for and left out."""
    quarantine: tuple[str, ...] = ()
    """Signals of `suspicion.parquet` whose samples are kept from training. They stay readable. Shards can then be
    trained on when the list has ended, not before."""
    compare_with: str = ""
    """Shards of an earlier ingest of this list: what has changed since then is reported."""
    policy: FetchPolicy = field(default_factory=FetchPolicy)

    def __post_init__(self) -> None:
        positive(self, "ingest", "samples_per_shard", "image_size", "threads", "timeout_s", "max_in_flight")
        if self.encode_format == "png" and not 0 <= self.encode_quality <= 9:
            raise ConfigError(
                f"ingest.encode_quality: expected 0 to 9 for png (compression), got {self.encode_quality}. Set 6."
            )
