"""Why a URL gave no sample: one registry of reasons, under which every failure is counted.

Our own code raises `FetchError`, whose message begins with the reason; img2dataset keeps only the message. Messages of other
libraries are matched by `_PATTERNS`.
"""

import re
from dataclasses import dataclass


class FetchError(OSError):
    """A URL that gives no sample; the text is `<reason>: <what happened>`. Raises `KeyError` for a reason not in `REASONS`."""

    def __init__(self, reason: str, text: str):
        REASONS[reason]
        super().__init__(f"{reason}: {text}")


@dataclass(frozen=True)
class Reason:
    """One entry of the registry."""

    name: str
    help: str
    transient: bool = False
    """The failure may be temporary: a later pass retries the URL."""
    bad: bool = False
    """Something arrived and is unusable. Only these count against `data.max_bad_frac`; failures to fetch do not."""
    refused: bool = False
    """Refused by a rule of ours or of the site, not by accident."""


REASONS: dict[str, Reason] = {
    reason.name: reason
    for reason in (
        Reason("bad_url", "not a valid URL with a host"),
        Reason("refused_scheme", "neither http nor https", refused=True),
        Reason("refused_address", "the host, or what it redirects to, is not at a public address", refused=True),
        Reason("refused_host", "denied, or not on the list of allowed hosts", refused=True),
        Reason("refused_port", "a port of another service", refused=True),
        Reason("refused_credentials", "a URL with a user or password", refused=True),
        Reason("too_many_redirects", "more redirects than the policy allows, or a loop", refused=True),
        Reason("robots_txt", "the site's robots.txt forbids it", refused=True),
        Reason(
            "robots_unreachable",
            "robots.txt answers 429 or 5xx, which forbids all until it can be read",
            transient=True,
        ),
        Reason("opted_out", "X-Robots-Tag: noai, noimageai, noml, noindex or noimageindex", refused=True),
        Reason("no_host", "the name has no address", transient=True),
        Reason("timeout", "the server was silent for too long", transient=True),
        Reason("too_slow", "the whole answer took longer than the deadline", transient=True),
        Reason("connection_refused", "nobody listens there", transient=True),
        Reason("connection_reset", "the connection was cut", transient=True),
        Reason("unreachable", "no route to that network", transient=True),
        Reason("tls_error", "the certificate or the TLS handshake is invalid"),
        Reason("bad_response", "the answer is not HTTP, or its head is too large"),
        Reason(
            "host_busy",
            "the host's rate limit gave no permit within the deadline; ingest.policy.host_rates raises a domain's limit",
            transient=True,
        ),
        Reason("host_down", "the host has failed several times and is left alone for a while", transient=True),
        Reason("too_large", "more bytes than the policy allows", refused=True),
        Reason("truncated_image", "fewer bytes than the server promised", transient=True, bad=True),
        Reason("bad_encoding", "the compressed answer cannot be unpacked", bad=True),
        Reason("not_an_image", "the response is not an image", bad=True),
        Reason("too_many_pixels", "the image is larger than the policy allows", bad=True),
        Reason("animated", "an image of several frames, which the policy refuses", refused=True),
        Reason("too_small", "the image is smaller than ingest.min_image_size", refused=True),
        Reason("aspect_ratio", "the aspect ratio is above ingest.max_aspect_ratio", refused=True),
        Reason("undecodable", "an image that cannot be decoded", bad=True),
        Reason("empty_caption", "no caption", bad=True),
        Reason("caption_too_long", "a caption of more bytes than any real caption has", bad=True),
        Reason("hash_mismatch", "the bytes do not match the hash in the list", refused=True),
        Reason("quarantined", "suspected, and withheld from training by ingest.quarantine", refused=True),
        Reason("kills_worker", "the process that handled this row died each time", bad=True),
        Reason("truncated_tar", "the shard's tar was cut short", bad=True),
        Reason("no_record", "the row is in neither tar nor parquet", bad=True),
        Reason("other", "none of the other reasons", transient=True),
    )
}

_PATTERNS = (
    # Messages of img2dataset and urllib in `error_message`; the first match wins.
    (re.compile(r"X-Robots-Tag"), "opted_out"),
    (re.compile(r"is not allowed"), "refused_scheme"),
    (re.compile(r"HTTP Error (\d{3})"), r"http_\1"),
    (re.compile(r"timed out"), "timeout"),
    (re.compile(r"[Cc]onnection refused"), "connection_refused"),
    (re.compile(r"[Cc]onnection reset|Remote end closed|Broken pipe"), "connection_reset"),
    (
        re.compile(r"Name or service not known|name resolution|No address associated|nodename nor|getaddrinfo"),
        "no_host",
    ),
    (re.compile(r"unreachable|No route to host"), "unreachable"),
    (re.compile(r"SSL|certificate", re.IGNORECASE), "tls_error"),
    (re.compile(r"IncompleteRead"), "truncated_image"),
    (re.compile(r"CV_IO_MAX_IMAGE|image area too large"), "too_many_pixels"),
    (re.compile(r"image too small"), "too_small"),
    (re.compile(r"aspect ratio"), "aspect_ratio"),
    (re.compile(r"Image decoding error|OpenCV|cv2"), "not_an_image"),
    (re.compile(r"unknown url type|no host given|control characters|nonnumeric port|codec|Invalid"), "bad_url"),
)
_OWN = re.compile(rf"\b({'|'.join(REASONS)}): ")
_TRANSIENT_STATUS = re.compile(r"http_(408|425|429|5\d\d)")


def reason_of(message: str) -> str:
    """The reason under which an error message is counted, such as `http_404`; `other` if none matches."""
    if own := _OWN.search(message):
        return own[1]
    for pattern, name in _PATTERNS:
        if found := pattern.search(message):
            return found.expand(name)
    return "other"


def is_transient(name: str) -> bool:
    """Whether a URL that failed for this reason is worth a later retry."""
    return REASONS[name].transient if name in REASONS else bool(_TRANSIENT_STATUS.fullmatch(name))
