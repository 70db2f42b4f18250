"""Signals from URLs and captions alone: a host that owns a topic, and captions made from one template.

Both are counted in a first pass with heavy hitters of fixed size; a second pass assigns the samples.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from ingest.signals.group_by import ExternalGroupBy
from ingest.signals.heavy_hitters import HeavyHitters
from ingest.signals.normal_forms import CaptionWords, mix
from ingest.signals.suspect_groups import MAX_GROUPS, MAX_SHOWN_CHARS, SuspectGroups

_PAIR = np.dtype([("host", "<u8"), ("word", "<u8")])
_FILL = np.dtype([("hash", "<u8"), ("slot", "<u8"), ("key", "<u8"), ("shard", "<u4")])
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MASK = np.uint64(0xD6E8FEB86659FD93)


class HostTopics:
    """`host_concentration`: a host that uses one word in most of its captions, and far more often than others.

    With k captions of host h that have word w, c_h captions of h, c_w captions with w and N captions:

        score = sqrt(k / c_h * k / c_w),   where  k >= MIN_SAMPLES,  k / c_h >= MIN_OF_HOST,  k / c_w >= MIN_OF_WORD,
        (k / c_w) / (c_h / N) >= MIN_LIFT,  c_w - k >= MIN_ELSEWHERE

    The last condition excludes words that nobody else uses, such as the host's own name.
    """

    NAME = "host_concentration"
    MIN_SAMPLES = 20
    MIN_OF_HOST = 0.5
    MIN_OF_WORD = 0.2
    MIN_LIFT = 10.0
    MIN_ELSEWHERE = 8

    def __init__(self, capacity: int = 1 << 20):
        self.hosts, self.words = HeavyHitters(capacity // 4), HeavyHitters(capacity // 4)
        self.pairs = HeavyHitters(capacity, _PAIR)
        self.total = 0
        self._chosen: dict[int, tuple[int, float, str]] = {}
        self._hosts = self._words = np.zeros(0, np.uint64)

    def count(self, host: np.ndarray, caption_words: CaptionWords) -> None:
        """First pass: host hashes (B,), 0 for none, and the words of B captions."""
        caption, word = caption_words.distinct_content()
        pairs = np.empty(len(caption), _PAIR)
        pairs["host"], pairs["word"] = host[caption], caption_words.hash[word]
        self.total += len(host)
        self.hosts.add(host[host != 0])
        self.words.add(pairs["word"])
        pairs = pairs[pairs["host"] != 0]
        self.pairs.add(mix(pairs["host"]) ^ pairs["word"], pairs)

    def choose(self) -> None:
        """Between the passes: choose the suspicious hosts, with the highest-scoring word of each."""
        for counted in (self.hosts, self.words, self.pairs):
            counted.merge()
        both, pairs = self.pairs.counts.astype(float), self.pairs.payload
        of_host = np.maximum(self.hosts.count(pairs["host"]), both)
        of_word = np.maximum(self.words.count(pairs["word"]), both)
        good = (both >= self.MIN_SAMPLES) & (both >= self.MIN_OF_HOST * of_host) & (both >= self.MIN_OF_WORD * of_word)
        good &= (of_word - both >= self.MIN_ELSEWHERE) & (both * self.total >= self.MIN_LIFT * of_word * of_host)
        score = both / np.sqrt(of_host * of_word)
        for n in np.flatnonzero(good)[np.lexsort((pairs["word"][good], score[good]))].tolist():  # the best comes last
            evidence = (
                f"{both[n]:.0f} of its {of_host[n]:.0f} captions have the word, as {of_word[n] - both[n]:.0f} of all others "
                f"have; the host has {of_host[n] / self.total:.2%} of the samples and {both[n] / of_word[n]:.0%} of the word"
            )
            self._chosen[int(pairs["host"][n])] = (int(pairs["word"][n]), float(score[n]), evidence)
        best = sorted(self._chosen.items(), key=lambda item: (-item[1][1], item[0]))[:MAX_GROUPS]
        self._chosen = dict(sorted(best))
        self._hosts = np.array(list(self._chosen), np.uint64)
        self._words = np.array([word for word, _, _ in self._chosen.values()], np.uint64)

    def assign(
        self,
        shard: int,
        keys: np.ndarray,
        host: np.ndarray,
        names: pa.Array,
        caption_words: CaptionWords,
        suspect_groups: SuspectGroups,
    ) -> None:
        """Second pass: add the samples to the groups; `names` (B,) are the hosts."""
        if not self._chosen:
            return
        caption, word = caption_words.distinct_content()
        at = np.minimum(np.searchsorted(self._hosts, host[caption]), len(self._hosts) - 1)
        hit = (self._hosts[at] == host[caption]) & (self._words[at] == caption_words.hash[word])
        caption, word, at = caption[hit], word[hit], at[hit]
        order = np.argsort(at, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(at[order])) + 1):
            if not len(part):
                continue
            first, number = int(part[0]), int(self._hosts[at[part[0]]])
            text, name = caption_words.known[int(word[first])].as_py(), names[int(caption[first])].as_py()
            _, score, evidence = self._chosen[number]
            suspect_groups.open(
                self.NAME, number, score, f"{name[:MAX_SHOWN_CHARS]}, “{text[:MAX_SHOWN_CHARS]}”: {evidence}."
            )
            suspect_groups.add(self.NAME, number, np.full(len(part), shard), keys[caption[part]])


class Templates:
    """`caption_template`: many captions that differ in one word only.

    Each caption of n words gives n templates, each without one word; frequent templates are kept. With d different words in the
    gap and n - 1 words around it:  score = (1 - exp(-d / FILLS)) * min(1, (n - 1) / WORDS).
    """

    NAME = "caption_template"
    MIN_WORDS, MAX_WORDS = 7, 32
    MIN_FILLS = 20
    FILLS, WORDS = 100, 8
    MAX_TEMPLATES = 100_000
    """Number of templates that are kept, the most frequent ones."""

    def __init__(self, folder: Path, expected_rows: int, memory_bytes: int, capacity: int = 1 << 20):
        self.templates = HeavyHitters(capacity)
        self._fills = ExternalGroupBy(folder / "fills", _FILL, expected_rows // 4, memory_bytes)
        self._frequent, self._counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._text: dict[int, tuple[str, int]] = {}

    def count(self, caption_words: CaptionWords, captions: int) -> None:
        """First pass: count templates."""
        token, template = self._templates(caption_words, captions)
        whole = mix(_caption_hashes(caption_words, captions))[caption_words.caption[token]]
        _, first = np.unique(whole ^ template, return_index=True)  # repetitions of one caption count once
        self.templates.add(template[first])

    def choose(self) -> None:
        """Between the passes: choose the frequent templates."""
        self.templates.merge()
        counts = self.templates.counts
        best = np.sort(np.argsort(-counts, kind="stable")[: self.MAX_TEMPLATES])
        frequent = best[counts[best] >= self.MIN_FILLS]
        self._frequent, self._counts = self.templates.numbers[frequent], counts[frequent]

    def assign(self, shard: int, keys: np.ndarray, caption_words: CaptionWords) -> None:
        """Second pass: each caption goes to its most frequent template."""
        if not len(self._frequent):
            return
        token, template = self._templates(caption_words, len(keys))
        at = np.minimum(np.searchsorted(self._frequent, template), len(self._frequent) - 1)
        keep = self._frequent[at] == template
        token, template, count = token[keep], template[keep], self._counts[at[keep]]
        order = np.lexsort((template, -count, caption_words.caption[token]))
        token, template = token[order], template[order]
        caption, first = np.unique(caption_words.caption[token], return_index=True)
        token, template = token[first], template[first]
        rows = np.empty(len(caption), _FILL)
        rows["hash"], rows["slot"], rows["key"], rows["shard"] = (
            template,
            caption_words.hash[caption_words.word[token]],
            keys[caption],
            shard,
        )
        self._fills.add(rows)
        for value, where in zip(*map(np.ndarray.tolist, np.unique(template, return_index=True)), strict=True):
            if value not in self._text:
                self._text[value] = _with_gap(caption_words, int(token[where]))

    def finish(self, suspect_groups: SuspectGroups) -> None:
        """Add the samples of the templates with enough different words in the gap."""
        with self._fills as fills:
            for groups in fills.groups(self.MIN_FILLS):
                for start, rows in groups.runs():
                    number, fills_found = int(rows["hash"][0]), len(np.unique(rows["slot"]))
                    if groups.rank[start] == 0 and fills_found >= self.MIN_FILLS:
                        text, around = self._text[number]
                        score = (1 - np.exp(-fills_found / self.FILLS)) * min(1.0, around / self.WORDS)
                        evidence = f"{groups.size[start]} captions read “{text}” with {fills_found} different words in the gap."
                        suspect_groups.open(self.NAME, number, float(score), evidence)
                    suspect_groups.add(self.NAME, number, rows["shard"], rows["key"])

    def _templates(self, caption_words: CaptionWords, captions: int) -> tuple[np.ndarray, np.ndarray]:
        """The words that may be left out, and the hash of the caption without each."""
        length = np.bincount(caption_words.caption, minlength=captions)
        token = np.flatnonzero(
            (length >= self.MIN_WORDS)[caption_words.caption] & (length <= self.MAX_WORDS)[caption_words.caption]
        )
        with np.errstate(over="ignore"):
            gap = (_MASK - caption_words.hash[caption_words.word[token]]) * _weights(caption_words)[token]
            return token, mix(_caption_hashes(caption_words, captions)[caption_words.caption[token]] + gap)


def _weights(caption_words: CaptionWords) -> np.ndarray:
    """An odd number for each position in a caption, (T,) uint64."""
    position = np.arange(len(caption_words.caption)) - np.searchsorted(caption_words.caption, caption_words.caption)
    return mix(position.astype(np.uint64) * _STEP) | np.uint64(1)


def _caption_hashes(caption_words: CaptionWords, captions: int) -> np.ndarray:
    """A hash of each caption's words in order, (B,) uint64."""
    out = np.zeros(captions, np.uint64)
    if len(caption_words.caption):
        with np.errstate(over="ignore"):
            value = caption_words.hash[caption_words.word] * _weights(caption_words)
            there, first = np.unique(caption_words.caption, return_index=True)
            out[there] = np.add.reduceat(value, first)
    return out


def _with_gap(caption_words: CaptionWords, token: int) -> tuple[str, int]:
    """A caption with a gap in the place of a word, for display, and the number of words around it."""
    caption = caption_words.caption[token]
    tokens = range(*np.searchsorted(caption_words.caption, [caption, caption + 1]).tolist())
    words = ["…" if n == token else caption_words.known[int(caption_words.word[n])].as_py() for n in tokens]
    return " ".join(words)[:MAX_SHOWN_CHARS], len(words) - 1
