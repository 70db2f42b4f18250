"""Why a URL gave no sample: one registry of names, which every failure is counted under.

What refuses or fails here raises `FetchError`, whose message begins with the name; img2dataset keeps only the message. What other
libraries say is matched by `_SAID`.
"""

import re
from dataclasses import dataclass


class FetchError(OSError):
    """A URL that gives nothing; the text is `<reason>: <what happened>`. Raises `KeyError` for a name not in `REASONS`."""

    def __init__(self, reason: str, text: str):
        REASONS[reason]
        super().__init__(f"{reason}: {text}")


@dataclass(frozen=True)
class Reason:
    """One name of the registry."""

    name: str
    help: str
    passing: bool = False
    """It may be otherwise later: the URL is tried again."""
    bad: bool = False
    """Something arrived and is of no use. Only these count against `data.max_bad_frac`; that nothing arrives is weather."""
    refused: bool = False
    """By a rule of ours or of the site, not by accident."""


REASONS: dict[str, Reason] = {
    reason.name: reason
    for reason in (
        Reason("bad_url", "no URL of a host"),
        Reason("refused_scheme", "neither http nor https", refused=True),
        Reason("refused_address", "the host, or what it redirects to, is not at a public address", refused=True),
        Reason("refused_host", "denied, or not on the list of allowed hosts", refused=True),
        Reason("refused_port", "a port of another service", refused=True),
        Reason("refused_credentials", "a URL with a user or password", refused=True),
        Reason("too_many_redirects", "more redirects than the policy allows, or a loop", refused=True),
        Reason("robots_txt", "the site's robots.txt forbids it", refused=True),
        Reason(
            "robots_unreachable", "robots.txt answers 429 or 5xx, which forbids all until it can be read", passing=True
        ),
        Reason("opted_out", "X-Robots-Tag: noai, noimageai, noml, noindex or noimageindex", refused=True),
        Reason("no_host", "the name has no address", passing=True),
        Reason("timeout", "the server was silent for too long", passing=True),
        Reason("too_slow", "the whole answer took longer than the deadline", passing=True),
        Reason("connection_refused", "nobody listens there", passing=True),
        Reason("connection_reset", "the connection was cut", passing=True),
        Reason("unreachable", "no way to that network", passing=True),
        Reason("tls_error", "the certificate or the handshake is not good"),
        Reason("bad_response", "the answer is not HTTP, or its head is too large"),
        Reason(
            "host_busy",
            "the host's turn did not come within the deadline; ingest.policy.host_rates raises a domain's limit",
            passing=True,
        ),
        Reason("host_down", "the host has failed several times and is left alone for a while", passing=True),
        Reason("too_large", "more bytes than the policy allows", refused=True),
        Reason("truncated_image", "fewer bytes than the server promised", passing=True, bad=True),
        Reason("bad_encoding", "the compressed answer cannot be unpacked", bad=True),
        Reason("not_an_image", "something else than an image", bad=True),
        Reason("too_many_pixels", "a larger image than the policy allows", bad=True),
        Reason("animated", "an image of several frames, where the policy refuses these", refused=True),
        Reason("too_small", "a smaller image than ingest.min_image_size", refused=True),
        Reason("aspect_ratio", "a longer image than ingest.max_aspect_ratio", refused=True),
        Reason("undecodable", "an image that cannot be decoded", bad=True),
        Reason("empty_caption", "no caption", bad=True),
        Reason("caption_too_long", "a caption that no caption is", bad=True),
        Reason("hash_mismatch", "other bytes than the list promises", refused=True),
        Reason("quarantined", "suspected, and kept from training by ingest.quarantine", refused=True),
        Reason("kills_worker", "the process that handled this row died each time", bad=True),
        Reason("truncated_tar", "the shard's tar was cut short", bad=True),
        Reason("no_record", "the row is in neither tar nor parquet", bad=True),
        Reason("other", "something that no other name fits", passing=True),
    )
}

_SAID = (
    # What others write into `error_message`, first match wins.
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
_PASSING_STATUS = re.compile(r"http_(408|425|429|5\d\d)")


def reason_of(message: str) -> str:
    """The name under which an error message is counted, such as `http_404`; else `other`."""
    if own := _OWN.search(message):
        return own[1]
    for pattern, name in _SAID:
        if found := pattern.search(message):
            return found.expand(name)
    return "other"


def is_passing(name: str) -> bool:
    """Whether a URL that failed so may be tried again later."""
    return REASONS[name].passing if name in REASONS else bool(_PASSING_STATUS.fullmatch(name))
