"""Samples out of sealed shards: bytes by the shard's index, pixels out of bytes that anybody may have made."""

import io
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from roclip.data.cache import ShardCache, ShardUnreadableError, read_patiently
from roclip.data.shards import ShardRecord, read_index, tar_path
from roclip.errors import DataError

MAX_PIXELS = 89_478_485
"""An image with more is refused before it is decoded (Pillow's own bound)."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Those of Pillow's that are read, whatever the suffix says; others of its readers start programs or are seldom tested."""
OPEN_SHARDS = 128
"""Shards of which a process keeps the file and the index open."""
MAX_CAPTION_CHARS = 2048
"""A longer caption is cut: no model reads so far, and a tokenizer's time grows with the square of a word's length."""
_COLUMNS = ("key", "id", "image_offset", "image_size", "caption_offset", "caption_size", "json_offset", "json_size")


class BadSampleError(DataError):
    """One sample cannot be read; the message is the reason under which it is counted."""


class Readers:
    """A reader for each shard of a snapshot, made when it is needed; of those used last `OPEN_SHARDS` stay open."""

    def __init__(
        self, root: Path, records: Sequence[ShardRecord], cache: ShardCache | None = None, caption_key: str = ""
    ):
        self.root, self.records, self.cache, self.caption_key = root, records, cache, caption_key
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def __getitem__(self, shard: int) -> "ShardReader":
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = ShardReader(self.root, self.records[shard], self.cache, self.caption_key)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        return self._open[shard]


class ShardReader:
    """Random access to the samples of one sealed shard through its index.

    Args:
        cache: Where the copy of a shard lies that a store has; without one, each read asks the store for its range.
        caption_key: Key of the json member that holds the captions; empty reads the txt member.
    """

    def __init__(self, root: Path, record: ShardRecord, cache: ShardCache | None = None, caption_key: str = ""):
        self.root, self.record, self.caption_key = root, record, caption_key
        self._tar = tar_path(root, record)
        self.cache = None if isinstance(self._tar, Path) else cache
        self._index: dict[str, list] | None = None
        self._file: io.BufferedReader | None = None
        self._problem = ""

    @property
    def index(self) -> dict[str, list]:
        """Columns key, image_offset, image_size, caption_offset, caption_size; id, json_offset, json_size where noted."""
        if self._index is not None:
            return self._index
        self._index = index = read_index(self.root, self.record.name, _COLUMNS).to_pydict()
        return index

    def key(self, sample: int) -> str:
        return self.index["key"][sample]

    def id(self, sample: int) -> int:
        """The number under which training knows the sample."""
        return self.index["id"][sample] if "id" in self.index else int(self.key(sample))

    def read(self, sample: int) -> tuple[bytes, str]:
        """Encoded image and its first caption. Raises `BadSampleError`."""
        return self.image(sample), self.captions(sample)[0]

    def image(self, sample: int) -> bytes:
        """Encoded image. Raises `BadSampleError`."""
        return self._member("image", sample)

    def captions(self, sample: int) -> list[str]:
        """The txt member, or what the json member has under `caption_key`; at least one. Raises `BadSampleError`."""
        if self.caption_key:
            return _captions_of(self._member("json", sample), self.caption_key)
        try:
            caption = self._member("caption", sample).decode().strip()
        except UnicodeDecodeError as error:
            raise BadSampleError("caption_not_utf8") from error
        if not caption:
            raise BadSampleError("empty_caption")
        return [caption[:MAX_CAPTION_CHARS]]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _member(self, kind: str, sample: int) -> bytes:
        if f"{kind}_size" not in self.index:
            raise BadSampleError(f"no_{kind}")
        offset, size = (self.index[f"{kind}_{column}"][sample] for column in ("offset", "size"))
        if not offset:  # content lies behind a header
            raise BadSampleError(f"no_{kind}")
        return self._bytes(offset, size)

    def _bytes(self, offset: int, size: int) -> bytes:
        if self._problem:
            raise BadSampleError(self._problem)
        try:
            if isinstance(self._tar, Path) or self.cache:
                piece = self._from_file(offset, size)
            else:
                piece = read_patiently(lambda: self._from_store(offset, size))
        except ShardUnreadableError as error:
            self._problem = str(error)
            raise BadSampleError(self._problem) from error
        except OSError as error:
            raise BadSampleError("shard_not_readable") from error
        if len(piece) < size:
            raise BadSampleError("truncated_tar")
        return piece

    def _from_file(self, offset: int, size: int) -> bytes:
        if self._file is None:
            path = self.cache.get(self.root, self.record) if self.cache else self._tar
            self._file = path.open("rb")
        self._file.seek(offset)
        return self._file.read(size)

    def _from_store(self, offset: int, size: int) -> bytes:
        store: Any = self._tar
        piece = store.fs.cat_file(store.path, start=offset, end=offset + size)
        if len(piece) > size:  # a web server that knows no ranges sends all
            piece = piece[offset : offset + size]
        if len(piece) < size:
            raise ShardUnreadableError("truncated_tar")
        return piece

    def __del__(self):
        self.close()


def _captions_of(content: bytes, key: str) -> list[str]:
    """The caption, or list of captions, that a json object has under a key, without the empty ones."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("broken_json") from error
    value = found.get(key) if isinstance(found, dict) else None
    captions = [each.strip() for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
    if not any(captions):
        raise BadSampleError("no_caption")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which json may hold and no tokenizer takes
        raise BadSampleError("caption_not_utf8") from error
    return [caption[:MAX_CAPTION_CHARS] for caption in captions if caption]


def decode(encoded: bytes, size: int) -> np.ndarray:
    """An encoded image to (size, size, 3) uint8, resized if it is of another size.

    Pillow reads the header, so that a bomb is refused before it is decoded. A whole JPEG is then decoded by OpenCV, in the
    least of libjpeg's scales (1/2, 1/4, 1/8) that has the pixels, which takes half of Pillow's time for the same bits; all
    else, and a JPEG without its end, by Pillow, which says what it cannot read. Raises `BadSampleError`.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSampleError("too_many_pixels")
            if image.format == "JPEG" and image.mode in ("RGB", "L") and encoded.rstrip(b"\0").endswith(b"\xff\xd9"):
                pixels = _decode_jpeg(encoded, min(image.size) // size)
            else:
                pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSampleError("undecodable_image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # where warnings are errors
        raise BadSampleError("too_many_pixels") from error
    if pixels.shape[:2] == (size, size):
        return pixels
    shrinks = min(pixels.shape[:2]) > size
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _decode_jpeg(encoded: bytes, spare: int) -> np.ndarray:
    """RGB, smaller by the largest of libjpeg's factors that is at most `spare`."""
    scales = ((8, cv2.IMREAD_REDUCED_COLOR_8), (4, cv2.IMREAD_REDUCED_COLOR_4), (2, cv2.IMREAD_REDUCED_COLOR_2))
    flags = next((flags for factor, flags in scales if spare >= factor), cv2.IMREAD_COLOR)
    pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise BadSampleError("undecodable_image")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
