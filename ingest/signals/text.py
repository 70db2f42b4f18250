"""Signals that urls and captions alone give: a host that owns a topic, and captions made from one template.

Both are counted in one pass with sketches of fixed size, and given their samples in a second one.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from ingest.signals.findings import MOST_GROUPS, SHOWN_CHARS, SuspectGroups
from ingest.signals.group_by import ExternalGroupBy
from ingest.signals.heavy_hitters import HeavyHitters
from ingest.signals.normal_forms import CaptionWords, mix

_PAIR = np.dtype([("host", "<u8"), ("word", "<u8")])
_FILL = np.dtype([("hash", "<u8"), ("slot", "<u8"), ("key", "<u8"), ("shard", "<u4")])
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MASK = np.uint64(0xD6E8FEB86659FD93)


class HostTopics:
    """`host_concentration`: a host that says one word in most of its captions, and says it far more often than others.

    With k captions of host h that have word w, c_h captions of h, c_w captions with w and N captions:

        score = sqrt(k / c_h * k / c_w),   where  k >= MIN_SAMPLES,  k / c_h >= MIN_OF_HOST,  k / c_w >= MIN_OF_WORD,
        (k / c_w) / (c_h / N) >= MIN_LIFT,  c_w - k >= MIN_ELSEWHERE

    The last one leaves out names that nobody else uses, such as the host's own.
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

    def count(self, host: np.ndarray, said: CaptionWords) -> None:
        """First pass: host hashes (B,), 0 for none, and the words of B captions."""
        caption, word = said.distinct_content()
        pairs = np.empty(len(caption), _PAIR)
        pairs["host"], pairs["word"] = host[caption], said.hash[word]
        self.total += len(host)
        self.hosts.add(host[host != 0])
        self.words.add(pairs["word"])
        pairs = pairs[pairs["host"] != 0]
        self.pairs.add(mix(pairs["host"]) ^ pairs["word"], pairs)

    def choose(self) -> None:
        """Between the passes: which host and word it is, the word with the highest score for each host."""
        for counted in (self.hosts, self.words, self.pairs):
            counted.settle()
        both, pairs = self.pairs.counts.astype(float), self.pairs.carried
        of_host = np.maximum(self.hosts.count(pairs["host"]), both)
        of_word = np.maximum(self.words.count(pairs["word"]), both)
        good = (both >= self.MIN_SAMPLES) & (both >= self.MIN_OF_HOST * of_host) & (both >= self.MIN_OF_WORD * of_word)
        good &= (of_word - both >= self.MIN_ELSEWHERE) & (both * self.total >= self.MIN_LIFT * of_word * of_host)
        score = both / np.sqrt(of_host * of_word)
        for n in np.flatnonzero(good)[np.lexsort((pairs["word"][good], score[good]))].tolist():  # the best comes last
            said = (
                f"{both[n]:.0f} of its {of_host[n]:.0f} captions have the word, as {of_word[n] - both[n]:.0f} of all others "
                f"have; the host has {of_host[n] / self.total:.2%} of the samples and {both[n] / of_word[n]:.0%} of the word"
            )
            self._chosen[int(pairs["host"][n])] = (int(pairs["word"][n]), float(score[n]), said)
        best = sorted(self._chosen.items(), key=lambda item: (-item[1][1], item[0]))[:MOST_GROUPS]
        self._chosen = dict(sorted(best))
        self._hosts = np.array(list(self._chosen), np.uint64)
        self._words = np.array([word for word, _, _ in self._chosen.values()], np.uint64)

    def assign(
        self, shard: int, keys: np.ndarray, host: np.ndarray, names: pa.Array, said: CaptionWords, into: SuspectGroups
    ) -> None:
        """Second pass: give the findings their samples; `names` (B,) are the hosts."""
        if not self._chosen:
            return
        caption, word = said.distinct_content()
        at = np.minimum(np.searchsorted(self._hosts, host[caption]), len(self._hosts) - 1)
        hit = (self._hosts[at] == host[caption]) & (self._words[at] == said.hash[word])
        caption, word, at = caption[hit], word[hit], at[hit]
        order = np.argsort(at, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(at[order])) + 1):
            if not len(part):
                continue
            first, number = int(part[0]), int(self._hosts[at[part[0]]])
            text, name = said.known[int(word[first])].as_py(), names[int(caption[first])].as_py()
            _, score, evidence = self._chosen[number]
            into.open(self.NAME, number, score, f"{name[:SHOWN_CHARS]}, “{text[:SHOWN_CHARS]}”: {evidence}.")
            into.add(self.NAME, number, np.full(len(part), shard), keys[caption[part]])


class Templates:
    """`caption_template`: many captions that are the same but for one word.

    Each caption of n words stands for n templates, one word left out in each; frequent templates are kept. With d different
    words in the gap and n - 1 words around it:  score = (1 - exp(-d / FILLS)) * min(1, (n - 1) / WORDS).
    """

    NAME = "caption_template"
    MIN_WORDS, MAX_WORDS = 7, 32
    MIN_FILLS = 20
    FILLS, WORDS = 100, 8
    MOST = 100_000
    """Templates that are followed, the most frequent ones."""

    def __init__(self, folder: Path, expected_rows: int, memory_bytes: int, capacity: int = 1 << 20):
        self.templates = HeavyHitters(capacity)
        self._fills = ExternalGroupBy(folder / "fills", _FILL, expected_rows // 4, memory_bytes)
        self._frequent, self._counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._text: dict[int, tuple[str, int]] = {}

    def count(self, said: CaptionWords, captions: int) -> None:
        """First pass."""
        token, template = self._masked(said, captions)
        whole = mix(_whole(said, captions))[said.caption[token]]
        _, first = np.unique(whole ^ template, return_index=True)  # a caption that repeats is no burst of them
        self.templates.add(template[first])

    def choose(self) -> None:
        """Between the passes."""
        self.templates.settle()
        counts = self.templates.counts
        best = np.sort(np.argsort(-counts, kind="stable")[: self.MOST])
        frequent = best[counts[best] >= self.MIN_FILLS]
        self._frequent, self._counts = self.templates.numbers[frequent], counts[frequent]

    def assign(self, shard: int, keys: np.ndarray, said: CaptionWords) -> None:
        """Second pass: each caption goes to the most frequent of its templates."""
        if not len(self._frequent):
            return
        token, template = self._masked(said, len(keys))
        at = np.minimum(np.searchsorted(self._frequent, template), len(self._frequent) - 1)
        keep = self._frequent[at] == template
        token, template, count = token[keep], template[keep], self._counts[at[keep]]
        order = np.lexsort((template, -count, said.caption[token]))
        token, template = token[order], template[order]
        caption, first = np.unique(said.caption[token], return_index=True)
        token, template = token[first], template[first]
        rows = np.empty(len(caption), _FILL)
        rows["hash"], rows["slot"], rows["key"], rows["shard"] = (
            template,
            said.hash[said.word[token]],
            keys[caption],
            shard,
        )
        self._fills.add(rows)
        for value, where in zip(*map(np.ndarray.tolist, np.unique(template, return_index=True)), strict=True):
            if value not in self._text:
                self._text[value] = _shown(said, int(token[where]))

    def finish(self, into: SuspectGroups) -> None:
        """Give the findings their samples, where the gap has enough different words."""
        with self._fills as fills:
            for groups in fills.groups(self.MIN_FILLS):
                bounds = groups.starts()
                for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                    rows = groups.rows[start:stop]
                    number, fills_found = int(rows["hash"][0]), len(np.unique(rows["slot"]))
                    if groups.rank[start] == 0 and fills_found >= self.MIN_FILLS:
                        text, around = self._text[number]
                        score = (1 - np.exp(-fills_found / self.FILLS)) * min(1.0, around / self.WORDS)
                        said = f"{groups.size[start]} captions read “{text}” with {fills_found} different words in the gap."
                        into.open(self.NAME, number, float(score), said)
                    into.add(self.NAME, number, rows["shard"], rows["key"])

    def _masked(self, said: CaptionWords, captions: int) -> tuple[np.ndarray, np.ndarray]:
        """Which words may be left out, and the hash of the caption without each."""
        length = np.bincount(said.caption, minlength=captions)
        token = np.flatnonzero((length >= self.MIN_WORDS)[said.caption] & (length <= self.MAX_WORDS)[said.caption])
        with np.errstate(over="ignore"):
            gap = (_MASK - said.hash[said.word[token]]) * _weights(said)[token]
            return token, mix(_whole(said, captions)[said.caption[token]] + gap)


def _weights(said: CaptionWords) -> np.ndarray:
    """An odd number for each place in a caption, (T,) uint64."""
    place = np.arange(len(said.caption)) - np.searchsorted(said.caption, said.caption)
    return mix(place.astype(np.uint64) * _STEP) | np.uint64(1)


def _whole(said: CaptionWords, captions: int) -> np.ndarray:
    """A hash of each caption's words in their order, (B,) uint64."""
    out = np.zeros(captions, np.uint64)
    if len(said.caption):
        with np.errstate(over="ignore"):
            value = said.hash[said.word] * _weights(said)
            there, first = np.unique(said.caption, return_index=True)
            out[there] = np.add.reduceat(value, first)
    return out


def _shown(said: CaptionWords, token: int) -> tuple[str, int]:
    """A caption with a gap at a word, to be read, and the number of words around it."""
    caption = said.caption[token]
    of_it = range(*np.searchsorted(said.caption, [caption, caption + 1]).tolist())
    words = ["…" if n == token else said.known[int(said.word[n])].as_py() for n in of_it]
    return " ".join(words)[:SHOWN_CHARS], len(words) - 1
