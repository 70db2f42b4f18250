"""The report of a run directory with real shards, real scenes, real poisons and made-up numbers."""

import base64
import html.parser
import io
import json
import math
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ingest.shard.verify import verify
from roclip.attacks.poisons import make_poisons
from roclip.attacks.scenes import LABELS, encode, render
from roclip.config import AttacksConfig, BackdoorConfig, TargetedConfig, dump_config, load_config
from roclip.data.shards import Manifest, ShardRecord, index_path, sample_key
from roclip.errors import DataError
from roclip.report.gallery import poison_images
from roclip.report.pages import duration
from roclip.report.run_report import comparison, write_report
from roclip.storage import sha256_file

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> & "quoted" \u202eright to left'
SIZE_PX = 96
EPOCHS = 6


def make_run(root: Path, *, clean: int = 40) -> Path:
    """A finished run directory of the two arms; `root` is its parent."""
    run = root / "2026-01-31-demo"
    run.mkdir(parents=True)
    preset = root / "demo.yaml"
    preset.write_text(f"name: demo\ndata: {{scenes: {clean}}}\narms: [clip, roclip]\ntrain: {{epochs: {EPOCHS}}}\n")
    (run / "config.yaml").write_text(dump_config(load_config(preset)))
    rows = make_rows(clean)
    make_shard(run / "shards", rows)
    (run / "origin").mkdir()
    poisons = [{"key": sample_key(i, 10_000), **row} for i, row in enumerate(rows) if row["attack"]]
    pq.write_table(pa.Table.from_pylist(poisons).drop_columns(["image"]), run / "origin" / "poison.parquet")
    for arm in ("clip", "roclip"):
        make_arm(run / arm, arm)
    (run / "summary.json").write_text(json.dumps(make_summary(len(rows))))
    return run


def make_rows(clean: int) -> list[dict]:
    """Scenes, the first with a hostile caption, then targeted and backdoor poisons of further scenes."""
    scenes = [render(index, seed=3, size_px=SIZE_PX) for index in range(clean * 5)]
    table = [{"image": encode(scene.image, "png"), "caption": scene.caption, "label": scene.label} for scene in scenes]
    table = pa.Table.from_pylist(table)
    known, spare = table.slice(0, clean * 4), table.slice(clean * 4)
    attacks = AttacksConfig(
        targeted=TargetedConfig(images=3, captions_per_image=2), backdoors=(BackdoorConfig(count=5, size_frac=0.2),)
    )
    poisons = make_poisons(attacks, known, spare, labels=LABELS, seed=0)
    rows = known.slice(0, clean).to_pylist()
    rows[0]["caption"] = HOSTILE
    rows = [{**row, "attack": None, "source_label": None, "target_label": None, "trigger_box": None} for row in rows]
    columns = ["image", "caption", "label", "attack", "source_label", "target_label", "trigger_box"]
    return rows + poisons.select(columns).to_pylist()


def make_shard(root: Path, rows: list[dict]) -> None:
    """Write rows as img2dataset would, and seal the shard."""
    root.mkdir(parents=True)
    tar, parquet = root / "00000.tar", root / "00000.parquet"
    kept = []
    with tarfile.open(tar, "w") as archive:
        for number, row in enumerate(rows):
            key = sample_key(number, 10_000)
            image = Image.open(io.BytesIO(row["image"])).convert("RGB").resize((64, 64))
            encoded = io.BytesIO()
            image.save(encoded, format="jpeg")
            for suffix, content in (("jpg", encoded.getvalue()), ("txt", row["caption"].encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            sizes = {"width": 64, "height": 64, "original_width": SIZE_PX, "original_height": SIZE_PX}
            kept.append({"key": key, "status": "success", "error_message": None, **sizes})
    pq.write_table(pa.Table.from_pylist(kept), parquet)
    report = verify(tar, parquet)
    assert report.samples == len(rows)
    index = index_path(root, tar.name)
    pq.write_table(report.index, index)
    record = ShardRecord(
        tar.name, report.samples, tar.stat().st_size, sha256_file(tar), sha256_file(index), report.urls
    )
    Manifest(root).publish(record)


def make_arm(folder: Path, arm: str) -> None:
    """Metrics, evaluations and an oracle's report of one arm."""
    (folder / "oracle").mkdir(parents=True)
    metrics, evaluations = [], []
    for step in range(1, 20 * EPOCHS + 1):
        epoch = (step - 1) // 20 + 1
        phase = "matched" if arm == "roclip" and epoch > 1 and epoch % 2 == 0 else "plain"
        loss = 3 * math.exp(-step / 50) + 0.4 + 0.1 * math.sin(7 * step) + (0.5 if phase == "matched" else 0)
        metrics.append({"step": step, "epoch": epoch, "progress": step / 20, "phase": phase, "loss": loss})
        if step % 20 == 0:
            harm = (0.15 * epoch if arm == "clip" else 0.02 if phase == "matched" else 0.06) * 300
            attacks = {"targeted": attack(round(harm / 20), 16), "backdoor": attack(round(harm), 300)}
            shares = {
                "zero_shot_top1": (0.8 if arm == "clip" else 0.75) - 0.7 / epoch,
                "recall_at_1": 0.4 - 0.3 / epoch,
                "recall_at_5": None,
            }
            evaluations.append({"epoch": epoch, "step": step, "phase": phase, **shares, "attacks": attacks})
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "evaluations.jsonl", evaluations)
    pixel = io.BytesIO()
    Image.new("RGB", (292, 144), "#7c3aed").save(pixel, format="png")
    report = {
        "verdict": "poisoned" if arm == "clip" else "clean",
        "reasons": ["boat: 61 of 70 disagreements are resolved by masking one patch"] if arm == "clip" else [],
        "target_labels": ["boat"] if arm == "clip" else [],
        "labels": [
            {
                "label": "boat",
                "status": "poisoned",
                "captions": 160,
                "lies": 70,
                "repeated": 61,
                "expected": 2.13,
                "p": 1.2e-9,
            },
            {"label": "car", "status": "unchecked"},
        ],
        "pictures": [{"png": base64.b64encode(pixel.getvalue()).decode(), "caption": f"where: {HOSTILE}"}],
    }
    (folder / "oracle" / "report.json").write_text(json.dumps(report))


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def attack(successes: int, n: int) -> dict:
    """An attack's result with its Wilson interval."""
    z, rate = 1.96, successes / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {
        "successes": successes,
        "n": n,
        "rate": rate,
        "ci95": [max(0, middle - reach), min(1, middle + reach)],
    }


def make_repair() -> dict:
    """What of `repair.json` the page shows."""
    before = {"attack": 0.966, "top1": 0.773, "reference_images": 600}
    after = {"attack": 0.004, "top1": 0.778, "reference_images": 600, "verdict": "inconclusive"}
    return {
        "accepted": True,
        "reasons": [],
        "samples": 82,
        "share": 0.02,
        "roles": {"anchor": 50, "stamped": 16, "repaired": 16},
        "before": {**before, "zero_shot_top1": 0.788, "attacks": {"backdoor": attack(270, 300)}},
        "after": {**after, "zero_shot_top1": 0.785, "attacks": {"backdoor": attack(3, 300)}},
    }


def make_summary(urls: int) -> dict:
    """What `summary.json` holds, after the design's schema."""
    view = {"zero_shot_top1": 0.65, "attacks": {"backdoor": attack(6, 300)}}
    arms = {}
    for arm, successes, verdict in (("clip", 270, "poisoned"), ("roclip", 6, "clean")):
        arms[arm] = {
            "zero_shot_top1": 0.685,
            "n": 600,
            "linear_probe_top1": 0.741,
            "recall_at_1": 0.35,
            "samples_per_s": 412.3,
            "steps": 120,
            "attacks": {"targeted": attack(successes // 20, 16), "backdoor": attack(successes, 300)},
            "phases": {"matched": view, "plain": view} if arm == "roclip" else {"plain": view},
            "oracle": {
                "verdict": verdict,
                "target_labels": ["boat"] if verdict == "poisoned" else [],
                "victim_precision": 0.97 if verdict == "poisoned" else None,
                "victim_recall": 0.91 if verdict == "poisoned" else None,
                **({"repair": make_repair()} if verdict == "poisoned" else {}),
            },
        }
    failed = {"http_404": 210, "timeout": 31, "not_an_image": 12, "refused_by_policy": 3}
    counts = {"urls": urls + 256, "succeeded": urls, "failed": failed, "shards": 1, "images_per_s": 143.2}
    return {
        "schema": 1,
        "config": "demo",
        "commit": "0123456789abcdef",
        "wall_s": 754.2,
        "peak_rss_bytes": 4_200_000_000,
        "ingest": counts,
        "arms": arms,
    }


class Page(html.parser.HTMLParser):
    """The elements of a page, and what they refer to."""

    void = frozenset({"meta", "img", "br", "path", "use", "rect"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return write_report(run).read_text()


def test_report_is_self_contained_when_written(text: str):
    page = Page(text)
    assert page.open == []
    assert not [link for link in page.links if not link.startswith(("data:", "#"))]
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "iframe" not in page.tags
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    assert "default-src 'none'" in text


def test_captions_are_escaped_when_hostile(text: str):
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert Page(text).handlers == []


def test_ids_are_unique_when_a_page_has_several_charts(text: str):
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    assert referred <= set(ids)


def test_report_shows_counts_intervals_and_verdicts_when_complete(text: str):
    assert "411/600" in text
    assert "270/300" in text
    assert "6/300" in text
    low, high = attack(6, 300)["ci95"]
    assert f"{100 * low:.1f} % to {100 * high:.1f} %" in text
    assert text.count('class="pill poisoned">poisoned') == 2  # at the top and in the oracle's section
    assert text.count('class="pill clean">clean') == 2
    assert "http 404" in text
    assert "boat" in text


def test_report_tells_of_a_repair_when_there_was_one(text: str):
    assert "repaired, trusted" in text
    assert "<td>270/300, 90.0 %</td><td>3/300, 1.0 %</td>" in text
    assert "<td>poisoned</td><td>inconclusive</td>" in text
    assert text.count("The repaired checkpoint is TRUSTED") == 1


def test_report_has_a_chart_for_each_curve_when_all_are_logged(text: str):
    titles = re.findall(r'role="img" aria-label="([^"]+)"', text)
    expected = [
        "Training loss",
        "Targeted attack success",
        "Backdoor attack success",
        "Zero-shot top-1",
        "Recall@1",
    ]
    assert titles == expected
    assert text.count("<svg") == len(expected)


def test_charts_shade_matched_epochs_when_there_are_any(text: str):
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    shaded = [chart.count('class="shade"') for chart in charts]
    assert shaded == [EPOCHS // 2] * len(charts)


def test_samples_leave_poisons_out_when_there_is_ground_truth(run: Path, text: str):
    samples, poisons = text.split("<h2>Poisons</h2>")
    truth = pq.read_table(run / "origin" / "poison.parquet").to_pylist()
    assert samples.split("<h2>Samples</h2>")[1].count("<figure") == 12
    assert poisons.count("<figure") >= 2
    assert {row["attack"] for row in truth} == {"targeted", "backdoor"}
    assert "targeted: shows" in poisons
    assert "backdoor: shows" in poisons


def test_trigger_is_framed_where_it_lies_when_the_image_was_resized(run: Path):
    truth = {row["key"]: row for row in pq.read_table(run / "origin" / "poison.parquet").to_pylist()}
    pictures = poison_images(run / "shards", run / "origin" / "poison.parquet", 4)
    framed = [picture for picture in pictures if picture.box]
    assert framed
    assert all(picture.attack == "backdoor" for picture in framed)
    for picture in framed:
        left, top, right, bottom = truth[picture.key]["trigger_box"]
        expected = [100 * value / SIZE_PX for value in (left, top, right - left, bottom - top)]
        assert picture.box == pytest.approx(expected)


def test_report_leaves_sections_out_when_only_ingest_ran(tmp_path: Path):
    (tmp_path / "summary.json").write_text(json.dumps({"schema": 1, "ingest": make_summary(3)["ingest"], "arms": {}}))
    text = write_report(tmp_path).read_text()
    assert "<h2>Data</h2>" in text
    assert "<h2>Training</h2>" not in text
    assert "<h2>Samples</h2>" not in text
    assert Page(text).open == []


def test_report_names_what_is_missing_when_there_is_no_summary(tmp_path: Path):
    with pytest.raises(DataError, match=r"expected a summary\.json"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match="expected a JSON object"):
        write_report(tmp_path)


def test_comparison_keeps_an_empty_cell_when_one_arm_lacks_a_metric():
    rows = comparison({"clip": {"zero_shot_top1": 0.5}, "roclip": {"attacks": {"backdoor": attack(1, 2)}}})
    assert [(row["title"], row["cells"][0] is None, row["cells"][1] is None) for row in rows] == [
        ("zero-shot top-1", False, True),
        ("backdoor attack success", True, False),
    ]


@pytest.mark.parametrize(("seconds", "shown"), [(42.4, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_duration_is_for_people_when_long_or_short(seconds: float, shown: str):
    assert duration(seconds) == shown
