"""The page of an ingest: `<run>/ingest/report.html`, one file that needs no other.

While the list is fetched it is written every `EVERY_S` and reloads itself; the last version stays. Text from the web is
escaped, and the page forbids itself scripts and requests.
"""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from markupsafe import Markup

from cluster.ingest.tally import SIZES_PX, USABLE, OutcomeTally
from roclip.report.charts import bars, chart
from roclip.report.curves import Curve
from roclip.report.gallery import GalleryImage, images_of, sample_images
from roclip.report.ingest_progress import IngestProgress, failure_reasons
from roclip.report.pages import environment
from roclip.report.watched_files import Tail
from roclip.storage import write_atomic

EVERY_S = 30.0
_SAMPLES, _HOSTS, _GROUPS, _IMAGES = 12, 25, 6, 8


class IngestPage:
    """The page of one ingest.

    Args:
        folder: `<run>/ingest`: the page, the log of progress, and the results of the signals.
        shards: Folder of the sealed shards.
        title: The list's name.
    """

    def __init__(self, folder: Path, shards: Path, title: str):
        self.folder, self.shards, self.title = folder, shards, title
        self._tally = OutcomeTally(shards)
        self._log = Tail(folder / "progress.jsonl")
        self._rows: list[dict[str, Any]] = []
        self._written_s = -EVERY_S
        self._now: IngestProgress | None = None

    def show(self, now: IngestProgress) -> None:
        """Record the progress of the ingest, and write the page if the last version is old."""
        self._now = now
        if time.monotonic() - self._written_s >= EVERY_S:
            self.write(running=True)

    def write(self, *, running: bool = False) -> Path:
        """Write the page and return its path."""
        self._written_s = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._now is not None:
            with self._log.path.open("a") as file:
                file.write(json.dumps({"time_s": round(time.time(), 1), **asdict(self._now)}) + "\n")
        self._tally.update()
        self._rows += self._log.read(self._rows.clear)
        rows, outcomes = self._rows, self._tally.outcomes()
        usable = outcomes.pop(USABLE, 0)
        page = (
            environment(Path(__file__).parent)
            .get_template("report.html.jinja")
            .render(
                title=self.title,
                running=running,
                every_s=int(EVERY_S),
                now=rows[-1] if rows else None,
                written=time.strftime("%Y-%m-%d %H:%M:%S"),
                rates=rate_chart(rows),
                sizes=size_chart(self._tally.sizes.tolist()) if self._tally.sizes.any() else "",
                reasons=failure_reasons(outcomes, of=usable + outcomes.total()),
                hosts=self._tally.top_hosts(_HOSTS),
                worst=self._tally.worst_hosts(_HOSTS),
                hosts_counted=len(self._tally.hosts),
                hosts_dropped=self._tally.hosts_dropped,
                usable=USABLE,
                found=read_found(self.folder),
                groups=self._groups(),
                samples=sample_images(self.shards, _SAMPLES),
            )
        )
        path = self.folder / "report.html"
        write_atomic(path, page)
        return path

    def _groups(self) -> list[dict[str, Any]]:
        """The groups with the highest scores of each signal, with images."""
        path = self.folder / "suspicion_groups.parquet"
        if not path.exists():
            return []
        chosen: dict[str, list[dict]] = {}
        for group in pq.read_table(path).sort_by([("score", "descending")]).to_pylist():
            groups = chosen.setdefault(group["signal"], [])
            if len(groups) < _GROUPS:
                groups.append({**group, "images": self._images(group["examples"][:_IMAGES])})
        return [{"signal": signal, "groups": groups} for signal, groups in chosen.items()]

    def _images(self, examples: Sequence[dict]) -> list[GalleryImage]:
        boxes = {example["key"]: example["box"] for example in examples}
        by_shard: dict[str, list[str]] = {}
        for example in examples:
            by_shard.setdefault(example["shard"], []).append(example["key"])
        return [image for shard, keys in by_shard.items() for image in images_of(self.shards, shard, keys, boxes)]


def read_found(folder: Path) -> dict[str, Any]:
    """The results of the signals over the whole ingest (`signals.json`); empty before they have run."""
    path = folder / "signals.json"
    return json.loads(path.read_text()) if path.exists() else {}


def rate_chart(rows: Sequence[dict[str, Any]]) -> Markup:
    """Samples a second between the logged moments, over minutes, as SVG; pauses between calls are left out."""
    points, passed_s = [], 0.0
    for before, after in itertools.pairwise(rows):
        seconds = after["time_s"] - before["time_s"]
        if 0 < seconds <= 4 * EVERY_S:
            passed_s += seconds
            points.append((passed_s / 60, max(after["succeeded"] - before["succeeded"], 0) / seconds))
    return chart([Curve("var(--accent)", points)], share=False, width=720) if points else Markup("")


def size_chart(counts: Sequence[int]) -> Markup:
    """Usable samples by the shorter side of the original, as SVG."""
    labels = [f"< {top}" if top < SIZES_PX[-1] else f"≥ {low}" for low, top in itertools.pairwise(SIZES_PX)]
    return bars(labels, counts)
