"""The EXIF of an image as img2dataset notes it: one JSON object of texts.

The library that reads it, exifread, is plain Python that goes where the bytes send it; so it may only read so much.
"""

import json
import logging

import exifread

from ingest.shard.images import FewReads

MAX_CHARS = 16 * 2**10
"""Longer ones are left out."""
_READS = 20_000
logging.getLogger("exifread").setLevel(logging.CRITICAL)  # it comments on every image without EXIF


def describe(content: bytes) -> str | None:
    """`{"Image Make": "…", …}` of the tags that exifread finds without the makers' own; None where it fails or finds too much."""
    try:
        tags = exifread.process_file(FewReads(content, _READS), details=False)
        text = json.dumps({name: str(value).strip() for name, value in tags.items() if value is not None})
    except Exception:  # as img2dataset does: what else can come of a hostile file
        return None
    return text if len(text) <= MAX_CHARS else None
