"""The page of an ingest, which an operator keeps open: `<run>/ingest/report.html`, one file that needs no other.

It is written anew every `EVERY_S` while the list is fetched, and reloads itself then; the last one stays. What came from the
web is escaped, and the page forbids itself scripts and requests.
"""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pyarrow.parquet as pq
from markupsafe import Markup
from matplotlib.figure import Figure

from cluster.ingest.tally import SIZES_PX, USABLE, OutcomeTally
from roclip.data.outcomes import REASONS, is_passing
from roclip.metrics.registry import read_metrics
from roclip.report.charts import GRID, STYLE, figure_svg
from roclip.report.gallery import GalleryImage, pictures_of, sample_pictures
from roclip.report.ingest_progress import IngestProgress
from roclip.report.readable import duration, percent
from roclip.storage import write_atomic

TEMPLATE = Path(__file__).with_name("report.html.jinja")
EVERY_S = 30.0
_SAMPLES, _HOSTS, _GROUPS, _PICTURES = 12, 25, 6, 8
_BLUE, _AMBER = "#1f6feb", "#d9622b"


class IngestPage:
    """The page of one ingest.

    Args:
        folder: `<run>/ingest`, where the page, the log of rates and what the signals found lie.
        shards: Where the sealed shards lie.
        title: The list's name.
    """

    def __init__(self, folder: Path, shards: Path, title: str):
        self.folder, self.shards, self.title = folder, shards, title
        self._tally = OutcomeTally(shards)
        self._log = folder / "progress.jsonl"
        self._written_s = -EVERY_S
        self._now: IngestProgress | None = None

    def show(self, now: IngestProgress) -> None:
        """Note where the ingest stands, and write the page, where the last of them is old."""
        self._now = now
        if time.monotonic() - self._written_s >= EVERY_S:
            self.write(running=True)

    def write(self, *, running: bool = False) -> Path:
        """Write the page of what is there. Returns its path."""
        self._written_s = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._now is not None:
            with self._log.open("a") as file:
                file.write(json.dumps({"time_s": round(time.time(), 1), **asdict(self._now)}) + "\n")
        self._tally.look()
        rows = read_metrics(self._log)
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.filters.update(percent=percent, duration=duration)
        page = environment.from_string(TEMPLATE.read_text()).render(
            title=self.title,
            running=running,
            every_s=int(EVERY_S),
            now=rows[-1] if rows else None,
            written=time.strftime("%Y-%m-%d %H:%M:%S"),
            rates=Markup(rate_chart(rows)) if len(rows) > 1 else "",
            sizes=Markup(size_chart(self._tally.sizes.tolist())) if self._tally.sizes.any() else "",
            reasons=reasons(self._tally),
            hosts=self._tally.top_hosts(_HOSTS),
            worst=self._tally.worst_hosts(_HOSTS),
            hosts_counted=len(self._tally.hosts),
            hosts_dropped=self._tally.hosts_dropped,
            usable=USABLE,
            found=read_found(self.folder),
            groups=self._groups(),
            samples=sample_pictures(self.shards, _SAMPLES),
        )
        path = self.folder / "report.html"
        write_atomic(path, page)
        return path

    def _groups(self) -> list[dict[str, Any]]:
        """Of each signal the groups of the highest score, with pictures."""
        path = self.folder / "suspicion_groups.parquet"
        if not path.exists():
            return []
        chosen: dict[str, list[dict]] = {}
        for group in pq.read_table(path).sort_by([("score", "descending")]).to_pylist():
            groups = chosen.setdefault(group["signal"], [])
            if len(groups) < _GROUPS:
                groups.append({**group, "pictures": self._pictures(group["examples"][:_PICTURES])})
        return [{"signal": signal, "groups": groups} for signal, groups in chosen.items()]

    def _pictures(self, examples: Sequence[dict]) -> list[GalleryImage]:
        boxes = {example["key"]: example["box"] for example in examples}
        by_shard: dict[str, list[str]] = {}
        for example in examples:
            by_shard.setdefault(example["shard"], []).append(example["key"])
        return [picture for shard, keys in by_shard.items() for picture in pictures_of(self.shards, shard, keys, boxes)]


def reasons(tally: OutcomeTally) -> list[dict[str, Any]]:
    """Every fate but the good one: its count, what it means, and of which kind it is."""
    counts: dict[str, int] = {}
    for fates in tally.hosts.values():
        for fate, count in fates.items():
            counts[fate] = counts.get(fate, 0) + count
    total = sum(counts.values())
    return [
        {"name": name, "count": count, "share": count / total, "help": _help(name), "kind": _kind(name)}
        for name, count in sorted(counts.items(), key=lambda item: -item[1])
        if name != USABLE
    ]


def _help(name: str) -> str:
    return REASONS[name].help if name in REASONS else f"the server answered {name.removeprefix('http_')}"


def _kind(name: str) -> str:
    if name in REASONS and REASONS[name].refused:
        return "refused"
    return "passing" if is_passing(name) else "bad"


def read_found(folder: Path) -> dict[str, Any]:
    """What the signals say of the whole ingest (`signals.json`); empty before they were asked."""
    path = folder / "signals.json"
    return json.loads(path.read_text()) if path.exists() else {}


def rate_chart(rows: Sequence[dict[str, Any]]) -> str:
    """Samples a second between the logged moments, as SVG; pauses between runs are left out."""
    minutes, rates, passed_s = [], [], 0.0
    for before, after in itertools.pairwise(rows):
        seconds = after["time_s"] - before["time_s"]
        if 0 < seconds <= 4 * EVERY_S:
            passed_s += seconds
            minutes.append(passed_s / 60)
            rates.append(max(after["succeeded"] - before["succeeded"], 0) / seconds)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "rates"}):
        figure = Figure(figsize=(7.2, 2.2), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.fill_between(minutes, rates, color=_BLUE, alpha=0.12, linewidth=0)
        axes.plot(minutes, rates, color=_BLUE, linewidth=1.5)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("minutes")
        axes.set_ylabel("samples/s")
        return figure_svg(figure)


def size_chart(counts: Sequence[int]) -> str:
    """Usable samples by the shorter side of the original, as SVG."""
    labels = [f"< {top}" if top < SIZES_PX[-1] else f"≥ {low}" for low, top in itertools.pairwise(SIZES_PX)]
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "sizes"}):
        figure = Figure(figsize=(7.2, 2.2), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.bar(labels, counts, color=_AMBER, width=0.7)
        axes.set_xlabel("shorter side of the original, px")
        axes.set_ylabel("samples")
        return figure_svg(figure)
