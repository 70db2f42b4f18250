"""Normal forms, words and 64-bit hashes of URLs and captions, for comparison.

Letters: B texts, T words in all of them.
"""

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # its functions are made at import, which no type checker sees
STOPWORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "but",
        "by",
        "for",
        "from",
        "has",
        "have",
        "he",
        "her",
        "his",
        "i",
        "in",
        "is",
        "it",
        "its",
        "my",
        "new",
        "no",
        "not",
        "of",
        "on",
        "or",
        "our",
        "she",
        "so",
        "that",
        "the",
        "their",
        "them",
        "they",
        "this",
        "to",
        "was",
        "we",
        "were",
        "what",
        "when",
        "which",
        "who",
        "will",
        "with",
        "you",
        "your",
    ]
)
"""Words that describe no image content."""
_DEFAULT_PORT = {"http": ":80", "https": ":443"}
_USUAL = re.compile(r"^https?://[a-z0-9.-]+/[^#]*$")
_NOT_WORDS = r"[^\pL\pM\pN]+"
_SMALL = 0x9E3779B97F4A7C15


def hashes(texts: pa.Array) -> np.ndarray:
    """64 bits of BLAKE2b of each text, (B,) uint64: one collision in 30 among 10^9 different texts."""
    binary = texts.cast(pa.binary()).to_pylist()
    digests = b"".join([blake2b(text, digest_size=8).digest() for text in binary])
    return np.frombuffer(digests, np.dtype("<u8")).astype(np.uint64)


def hash_each(texts: pa.Array) -> np.ndarray:
    """As `hashes`, but faster for repeated texts."""
    known = texts.dictionary_encode()
    return hashes(known.dictionary)[known.indices.to_numpy(zero_copy_only=False)]


def mix(numbers: np.ndarray) -> np.ndarray:
    """A permutation of the uint64 that scatters close numbers (splitmix64's finaliser)."""
    with np.errstate(over="ignore"):
        x = numbers.astype(np.uint64) + np.uint64(_SMALL)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sha_hashes(sha256: pa.Array) -> np.ndarray:
    """The first 64 bits of hexadecimal sha256 sums, (B,) uint64; 0 for an invalid one."""
    good = pc.match_substring_regex(sha256, "^[0-9a-fA-F]{64}$")
    head = pc.if_else(good, pc.utf8_slice_codeunits(sha256, 0, 16), "0" * 16)
    joined = bytes.fromhex("".join(head.to_pylist()))
    return np.frombuffer(joined, np.dtype(">u8")).astype(np.uint64)


def normal_urls(urls: pa.Array) -> pa.Array:
    """URLs with scheme and host in lower case, without default port and fragment."""
    usual = pc.match_substring_regex(urls, _USUAL.pattern)
    if pc.all(usual).as_py() or not len(urls):
        return urls
    texts = zip(urls.to_pylist(), usual.to_pylist(), strict=True)
    return pa.array([text if good else normal_url(text) for text, good in texts], pa.string())


def normal_url(url: str) -> str:
    """The normal form of one URL; anything else is only stripped of white space."""
    url = url.strip()
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    scheme = parts.scheme.lower()
    if scheme not in _DEFAULT_PORT:
        return url
    host = parts.netloc.lower().removesuffix(_DEFAULT_PORT[scheme]).removesuffix(":")
    return parts._replace(scheme=scheme, netloc=host, path=parts.path or "/", fragment="").geturl()


def hosts(urls: pa.Array) -> pa.Array:
    """The host of each URL in lower case, without port, or ""."""
    found = pc.extract_regex(urls, r"(?i)^\s*https?://(?:[^/?#@]*@)?(?P<host>\[[^\]/?#]*\]|[^/?#:]*)")
    return pc.fill_null(pc.utf8_lower(pc.struct_field(found, "host")), "")


def normal_captions(captions: pa.Array) -> pa.Array:
    """Captions in lower case and Unicode form NFKC, with single spaces."""
    texts = pc.utf8_lower(pc.utf8_normalize(captions, "NFKC"))
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(texts, r"\s+", " "))


@dataclass(frozen=True)
class CaptionWords:
    """The words of B captions, in order."""

    caption: np.ndarray
    """(T,) int64, ascending: index of each word's caption."""
    word: np.ndarray
    """(T,) int64: index of each word in `known`."""
    known: pa.Array
    """The vocabulary."""
    hash: np.ndarray
    """(known,) uint64."""
    content: np.ndarray
    """(known,) bool: content words, of at least three letters and no stop words."""

    def distinct_content(self) -> tuple[np.ndarray, np.ndarray]:
        """Caption and word of each distinct content word, sorted by both."""
        keep = self.content[self.word]
        pairs = np.unique(self.caption[keep] * max(1, len(self.known)) + self.word[keep])
        caption, word = np.divmod(pairs, max(1, len(self.known)))
        return caption, word


def words(normal: pa.Array) -> CaptionWords:
    """Split captions in normal form into words."""
    pieces = pc.split_pattern_regex(normal, _NOT_WORDS)
    caption = pc.list_parent_indices(pieces).to_numpy()
    flat = pc.list_flatten(pieces)
    there = pc.not_equal(flat, "").to_numpy(zero_copy_only=False)
    encoded = flat.filter(pa.array(there)).dictionary_encode()
    known = encoded.dictionary
    content = [len(word) >= 3 and word not in STOPWORDS and not word.isdigit() for word in known.to_pylist()]
    return CaptionWords(
        caption[there].astype(np.int64),
        encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64),
        known,
        hashes(known),
        np.array(content, bool),
    )


def short(hashes: np.ndarray) -> np.ndarray:
    """The 32 bits of each hash that a MinHash signature uses, never 0."""
    return (hashes >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def minhashes(caption_words: CaptionWords, captions: int, width: int = 8) -> np.ndarray:
    """MinHash signatures, (B, width) uint32: the smallest hashes of each caption's distinct content words, padded with zeros.

    The Jaccard index of two signatures estimates that of their words, and is exact if both captions have at most `width`.
    """
    caption, word = caption_words.distinct_content()
    value = short(caption_words.hash)[word]
    order = np.lexsort((value, caption))
    caption, value = caption[order], value[order]
    rank = np.arange(len(caption)) - np.searchsorted(caption, caption)
    out = np.zeros((captions, width), np.uint32)
    keep = rank < width
    out[caption[keep], rank[keep]] = value[keep]
    return out
