"""What the oracle check costs, and how well it ranks the victims.

    an image's share of the pass      seconds at the larger number of images against those at 1,000: flat is a ratio of 1
    forward passes an image           counted, against the budget of 2 of the model and 1 of the oracle
    putting together 1,000,000        scans of 1,000 images each: processor time and peak memory of merge and statistics
    victims (with --run)              average precision and AUROC of our order of suspects, against the local outlier factor
                                      (Breunig 2000) and the k-nearest distance of the same embeddings, found with FAISS; the
                                      model and the truth are the run's, one that `roclip run` has finished

The pass is of a small model and oracle with random weights, on scenes of 64 px: a network's time is that of any weights.

    python tests/bench/oracle.py [--quick] [--images 10000 100000] [--run runs/demo --arm clip]
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench import measure

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from kit import TINY_MODEL, write_shard
from rigged import GOOD

from roclip.attacks import scenes
from roclip.checkpoint import checkpoint
from roclip.data.shards import Manifest, ShardRecord
from roclip.evaluation.ranking import auroc, average_precision
from roclip.model.towers import Encoder, Towers
from roclip.oracle import statistics
from roclip.oracle.report import disagreements
from roclip.oracle.scan.saved import ShardScan
from roclip.oracle.scan.scan import ScanResult, merge, scan_shards
from roclip.oracle.scan.scorer import Scorer
from roclip.oracle.segmenters.trained import TrainedSegmenter, build_net
from roclip.oracle.statistics import Observations

SMALL, PER_SHARD, SIDE_PX = 1000, 500, 64
MERGED, LABELS = 1_000_000, (10, 100)
TIME_BUDGET_S, MEMORY_BUDGET = 60.0, 2 * 2**30
NEIGHBOURS = 16
SILENT = {"progress": lambda *_: None}


class Counting:
    """Counts the images that go through an encoder or a segmenter."""

    def __init__(self, inner: Encoder | TrainedSegmenter):
        self._inner, self.images_seen = inner, 0

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def images(self, images: np.ndarray):
        self.images_seen += len(images)
        return self._inner.images(images)

    def areas(self, images: np.ndarray):
        self.images_seen += len(images)
        return self._inner.areas(images)


def make_shards(root: Path, images: int) -> None:
    """Scenes that differ, of which each was rendered from one of 200, and captions that differ."""
    rendered = [scenes.render(each, seed=0, size_px=SIDE_PX) for each in range(200)]
    for number, start in enumerate(range(0, images, PER_SHARD)):
        samples = []
        for each in range(start, min(start + PER_SHARD, images)):
            scene = rendered[each % 200]
            pixels = scene.image.copy()
            pixels[0, 0], pixels[0, 1] = each % 256, each // 256 % 256
            samples.append((scenes.encode(pixels), f"{scene.caption} {each}"))
        write_shard(root, number, samples, PER_SHARD)
    Manifest(root).finish({})


def small_judges(folder: Path) -> tuple[Counting, Counting]:
    torch.manual_seed(0)
    (folder / "tiny.json").write_text(TINY_MODEL)
    segmenter = TrainedSegmenter(build_net(1 + len(scenes.LABELS)), scenes.LABELS, SIDE_PX)
    segmenter.calibration = dict.fromkeys(scenes.LABELS, GOOD)
    return Counting(Encoder(Towers("tiny", folder / "tiny.json"))), Counting(segmenter)


def time_pass(folder: Path, numbers: list[int], runs: int) -> None:
    encoder, segmenter = small_judges(folder)
    scorer = Scorer(encoder, segmenter, scenes.LABELS, ("a {}",))
    for number in (SMALL, *numbers):
        make_shards(folder / str(number), number)

    def an_image(number: int) -> float:
        start = time.perf_counter()
        scan_shards(scorer, folder / str(number), **SILENT)
        return (time.perf_counter() - start) / number

    small = partial(an_image, SMALL)
    for number in numbers:
        measure(
            "oracle", f"pass, an image of {number:,} and of {SMALL:,}", "s", partial(an_image, number), small, 0.9, runs
        )
        encoder.images_seen = segmenter.images_seen = 0
        scan_shards(scorer, folder / str(number), **SILENT)
        model = encoder.images_seen / number
        oracle = segmenter.images_seen / number
        measure("oracle", f"model's forward passes an image of {number:,}", "1", lambda model=model: model, 2.0, 1.0, 1)
        measure(
            "oracle", f"oracle's forward passes an image of {number:,}", "1", lambda oracle=oracle: oracle, 1.0, 1.0, 1
        )


def merge_millions(labels: int) -> dict[str, float]:
    """Processor seconds of each stage, and bytes at the peak, of this process."""
    rng, scans = np.random.default_rng(0), MERGED // 1000
    classes = [f"thing{c}" for c in range(labels)]
    one = synthetic_scan(classes, rng)
    record = ShardRecord("00000.tar", 1000, 1, "0" * 64, "0" * 64, 1000)
    shared = one.sha256[:10]  # of each shard 1 % are the first one's images
    before = peak_bytes()

    def each():
        for number in range(scans):
            digests = rng.integers(0, 256, (1000, 32), dtype=np.uint8)
            digests[:10] = shared
            order = pa.array(rng.permutation(1000))  # also, copies: no two scans share the memory of their words
            words = {"keys": one.keys.take(order), "captions": one.captions.take(order)}
            yield (
                dataclasses.replace(record, name=f"{number:05d}.tar"),
                dataclasses.replace(one, sha256=digests, **words),
            )

    start = time.process_time()
    scan = merge(each(), classes, SIDE_PX, MERGED)
    merged = time.process_time()
    assert len(scan.sha256) == MERGED - 10 * (scans - 1)
    statistics.run_tests(scan.observations, first(scan.observations, 2000), range(labels))
    return {"merge": merged - start, "statistics": time.process_time() - merged, "bytes": peak_bytes() - before}


def synthetic_scan(classes: list[str], rng: np.random.Generator) -> ShardScan:
    n, labels = 1000, len(classes)
    areas = rng.random((n, labels)).astype(np.float16) ** 8
    label = rng.integers(0, labels, n)
    return ShardScan(
        sha256=rng.integers(0, 256, (n, 32), dtype=np.uint8),
        seen=areas > 0.3,
        clear=areas > 0.6,
        areas=areas,
        top=np.stack([(label + k) % labels for k in range(5)], axis=1).astype(np.int32),
        scores=rng.random((n, 5)).astype(np.float32),
        features=None,
        image=np.arange(n, dtype=np.int32),
        sample=np.arange(n, dtype=np.int32),
        keys=pa.array([f"{k:09d}" for k in range(n)], pa.large_string()),
        captions=pa.array([f"a photo of one {classes[c]} on a table by the sea" for c in label], pa.large_string()),
        unreadable=0,
    )


def first(seen: Observations, number: int) -> Observations:
    return Observations(*(each[:number] for each in (seen.answer, seen.seen, seen.clear, seen.image, seen.named)))


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def time_merge(labels: int) -> None:
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(labels)], capture_output=True, text=True, check=True
    )
    spent = json.loads(done.stdout)
    for stage in ("merge", "statistics"):
        case = f"{stage} of {MERGED:,} images, {labels} labels"
        measure("oracle", case, "s of a processor", lambda stage=stage: spent[stage], TIME_BUDGET_S, 1.0, 1)
    case = f"memory of both, {MERGED:,} images, {labels} labels"
    measure("oracle", case, "bytes", lambda: spent["bytes"], MEMORY_BUDGET, 1.0, 1)


def compare_detection(run: Path, arm: str) -> None:
    """Rank the distinct images of a finished run; an image is poisoned if one of its samples is."""
    names = json.loads((run / "origin" / "labels.json").read_text())
    latest = checkpoint.named(run / arm / "checkpoints", "LATEST")
    assert latest is not None, f"{run / arm}: expected a trained checkpoint"
    segmenter = TrainedSegmenter.load(run / "segmenter")
    scorer = Scorer(Encoder.load(latest), segmenter, names["labels"], names["templates"])
    start = time.perf_counter()
    scan = scan_shards(scorer, run / "shards", **SILENT)
    print(
        json.dumps(
            {"bench": "oracle", "case": f"pass over {run.name}", "unit": "s", "ours": time.perf_counter() - start}
        )
    )
    attacks = pq.read_table(run / "origin" / "poison.parquet", columns=["key", "attack"]).to_pylist()
    attack_of = {row["key"]: row["attack"] for row in attacks}
    attack = np.array([attack_of.get(scan.keys[rows[0]], "") for rows in scan.caption_rows()])
    features = scan.features().astype(np.float32)
    rivals = {"LOF": outlier_factor(features), f"distance to neighbour {NEIGHBOURS}": neighbours(features)[1][:, -1]}
    ours = our_order(scan, names["labels"])
    for name in sorted(set(attack) - {""}):
        chosen = (attack == name) | (attack == "")
        for rival, theirs in rivals.items():
            for figure in (average_precision, auroc):
                mine, other = (float(figure(each[chosen], attack[chosen] != "")) for each in (ours, theirs))
                case = f"{figure.__name__} of {(attack == name).sum()} {name}, against {rival}"
                measure("oracle", case, "1", partial(float, mine), other, 1.0, 1, lower_is_better=False)


def our_order(scan: ScanResult, labels: list[str]) -> np.ndarray:
    """(N,): the higher, the earlier an image stands among the disagreements; 0 for those that do not."""
    score = np.zeros(len(scan.sha256))
    rows = disagreements(scan, np.zeros(len(score), dtype=bool), labels)
    for row in rows:
        score[row["image"]] = len(rows) + 1 - row["rank"]
    return score


def neighbours(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and distances (N, k) of each image's nearest others, the nearest first."""
    index = faiss.IndexFlatL2(features.shape[1])
    index.add(features)
    squares, numbers = index.search(features, NEIGHBOURS + 1)
    return numbers[:, 1:], np.sqrt(np.maximum(squares[:, 1:], 0))


def outlier_factor(features: np.ndarray) -> np.ndarray:
    """(N,): mean density of the neighbours over one's own, by reachability distance; over 1 lies apart."""
    numbers, distances = neighbours(features)
    reach = np.maximum(distances, distances[numbers, -1])
    density = 1 / np.maximum(reach.mean(axis=1), 1e-9)
    return density[numbers].mean(axis=1) / density


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 images, and the million with 10 labels only")
    parser.add_argument("--images", type=int, nargs="+", default=[10_000])
    parser.add_argument("--run", type=Path, help="a finished run with poison.parquet")
    parser.add_argument("--arm", default="clip")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(merge_millions(arguments.child)))
        sys.exit()
    for labels in LABELS[:1] if arguments.quick else LABELS:
        time_merge(labels)
    with tempfile.TemporaryDirectory() as folder:
        quick = arguments.quick
        time_pass(Path(folder), [2000] if quick else arguments.images, 1 if quick else 3)
    if arguments.run:
        compare_detection(arguments.run, arguments.arm)
