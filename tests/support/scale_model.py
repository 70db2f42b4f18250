"""What one step of training takes on W GPUs, part by part, from measured times and stated assumptions.

The towers, the search, the loss of a large world, the loader and the checkpoint are measured (`tests/bench/scale_measure.py`);
collectives are NCCL's own cost model; what a cluster has (links, store, ingest nodes) is assumed, and each assumption
stands here with its source. Nothing overlaps in a step but what the trainer overlaps: the loader and the store work ahead.

Letters: W GPUs, B local batch, G = B W, D feature width, P pool size, N weights.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Literal, NamedTuple

PARTS = ("towers", "gradients", "gather", "batch_norm", "loss", "pool", "checkpoint", "loader", "store")
"""Of a step."""
AHEAD = ("loader", "store")
"""These work ahead of it: only what they take longer than all others together is waited for."""


# ---- collectives ------------------------------------------------------------------------------------------------


class Protocol(NamedTuple):
    """How a collective may be done: its fixed time, the time of a hop inside a node and between nodes, and its share of
    the bandwidth."""

    algorithm: Literal["ring", "tree"]
    base_s: float
    near_s: float
    far_s: float
    bandwidth_frac: float


NCCL = (
    Protocol("ring", 3.6e-6, 0.85e-6, 2.7e-6, 1 / 4),
    Protocol("ring", 8.4e-6, 3.4e-6, 9.6e-6, 1.0),
    Protocol("tree", 4.4e-6, 0.94e-6, 5.0e-6, 0.9 / 3.8),
    Protocol("tree", 0.0, 28e-6, 50e-6, 0.9),
)
"""Low-latency and simple protocols with the constants of NCCL's src/graph/tuning.cc (commit 01afd20), NVLink and network."""


@dataclass(frozen=True)
class Wire:
    """The links between ranks."""

    ranks: int
    ranks_per_node: int
    bytes_per_s: float
    """Bus bandwidth: what each link of a ring over all ranks carries."""
    protocols: Sequence[Protocol] = NCCL

    @classmethod
    def ring(cls, ranks: int, bytes_per_s: float, hop_s: float) -> "Wire":
        """One process a node and a plain ring, as gloo has it."""
        return cls(ranks, 1, bytes_per_s, (Protocol("ring", 0.0, 0.0, hop_s, 1.0),))

    def all_reduce_s(self, size: float) -> float:
        """A ring's: 2 (W - 1) hops, and 2 (W - 1) / W of the bytes over each link; or a tree's, whichever is faster."""
        return self._fastest(size, 2, self.protocols)

    def all_gather_s(self, size: float) -> float:
        """`size` is what each rank has in the end. A ring's: W - 1 hops, and (W - 1) / W of the bytes over each link."""
        return self._fastest(size, 1, [each for each in self.protocols if each.algorithm == "ring"])

    def _fastest(self, size: float, rounds: int, protocols: Iterable[Protocol]) -> float:
        if self.ranks == 1:
            return 0.0
        nodes = -(-self.ranks // self.ranks_per_node)
        times = []
        for each in protocols:
            far, sent = nodes - 1, (self.ranks - 1) / self.ranks
            near = self.ranks - nodes
            if each.algorithm == "tree":
                far, near, sent = math.log2(nodes), self.ranks_per_node - 1, 1.0
            hops_s = near * each.near_s + far * each.far_s
            times.append(each.base_s + rounds * (hops_s + sent * size / self.bytes_per_s / each.bandwidth_frac))
        return min(times)


SMALL_SUMS = 8
"""Of a number over all ranks in a step of `roclip/training/loop.py`: counts, finite features, loss, norm, pairs that are kept."""


# ---- assumed ----------------------------------------------------------------------------------------------------

NVLINK_BYTES_PER_S = 360e9
"""80 % of the 450 GB/s that an H100's NVLink 4 carries each way (NVIDIA H100 data sheet: 900 GB/s both ways)."""
LINKS = {
    "400 Gb/s a GPU": 0.9 * 8 * 50e9,
    "100 Gb/s a node": 0.9 * 12.5e9,
    "25 Gb/s a node": 0.9 * 3.125e9,
}
"""Bus bandwidth between nodes of 8 GPUs: InfiniBand with an adapter for each GPU, and Ethernet; 90 % of the line rate."""
IMAGE_BYTES = 29_600
"""Of a sample in a tar: the mean of 400 photos of `clothing-masks` at 256 px, JPEG quality 95, as ingest writes them. The
measured loader reads rendered scenes, which are smaller and decode faster."""
GPU_HOURS_BETWEEN_FAILURES = 16_384 * 54 * 24 / 419
"""419 unplanned interruptions in 54 days on 16,384 H100 (The Llama 3 Herd of Models, arXiv:2407.21783, section 3.3.4)."""


@dataclass(frozen=True)
class Cluster:
    """What is rented."""

    link: str = "400 Gb/s a GPU"
    gpus_per_node: int = 8
    cores_per_gpu: int = 12
    """192 virtual cores, 96 real ones, for 8 H100 (AWS p5.48xlarge)."""
    store_bytes_per_s: float = 100e9
    """Of the store, over all readers."""
    store_first_byte_s: float = 0.15
    """100 to 200 ms (Amazon S3, performance guidelines)."""
    ingest_cores: int = 1600
    """100 nodes of 16."""
    memory_bytes: float = 80e9

    def wire(self, gpus: int) -> Wire:
        nodes = -(-gpus // self.gpus_per_node)
        between = LINKS[self.link]
        return Wire(gpus, self.gpus_per_node, NVLINK_BYTES_PER_S if nodes == 1 else min(between, NVLINK_BYTES_PER_S))


@dataclass(frozen=True)
class Job:
    """A training, as `configs` would have it. Half of the steps are matched: the paper's every second epoch."""

    model: str
    gpus: int
    pool: int = 65_536
    batch: int = 256
    """B."""
    matched_frac: float = 0.5
    overlap_frac: float = 0.0
    """Share of the backward pass under which gradients travel: none, as ZeRO 1 sends them after it (overlap_comm off)."""
    shard_above: int = 1 << 20
    """`pool.shard_above`; more than the pool keeps it whole on each rank."""
    gather_copies: bool = True
    """Whether each rank's piece of a gather is copied on its own, as `distributed.gather` does, or all are one tensor."""
    piece: int = 4096
    """Captions that a search takes at a time (`search.PIECE`)."""
    streams: int = 1024
    """`data.streams`; 16 unless it is set, which is too few for more than 16 nodes: see `fetched_times`."""
    checkpoint_every_s: float = 1800.0
    checkpoint_every_steps: int = 500
    cluster: Cluster = field(default_factory=Cluster)

    @property
    def global_batch(self) -> int:
        return self.batch * self.gpus

    @property
    def sharded(self) -> bool:
        return self.pool > self.shard_above and self.gpus > 1


# ---- measured ---------------------------------------------------------------------------------------------------


class Measured:
    """Lookups into what `scale.py --measure` wrote: exact where measured, between and beyond as said for each."""

    def __init__(self, found: Mapping):
        self.found = found
        self.models = {row["model"]: row for row in found["models"]}

    def rows(self, key: str, **wanted) -> list[dict]:
        """Rows of a table with these values, those that ran out of memory left out."""
        rows = [row for row in self.found[key] if all(row[name] == value for name, value in wanted.items())]
        return [row for row in rows if not row.get("out_of_memory")]

    def step(self, model: str, batch: int, kind: str) -> dict:
        """The medians of one kind of step; seconds grow with B between measured ones."""
        rows = self.rows("steps", model=model, kind=kind)
        parts = ("step_s", "augment_s", "forward_s", "loss_s", "backward_s", "optimizer_s")
        return {
            part: along({row["B"]: median(row[part]) if part == "step_s" else row[part] for row in rows}, batch)
            for part in parts
        }

    def search_s(self, width: int, pool: int, batch: int, piece: int = 4096) -> float:
        """Of a pool that each rank holds whole; beyond what was measured in proportion to B and P. With more captions a
        `piece` than the product takes, by the ratio that was measured at one P."""
        rows = self.rows("searches", D=width, storage="fp32")
        by_pool = {
            size: along({row["B"]: row["search_s"] for row in rows if row["P"] == size}, batch)
            for size in {row["P"] for row in rows}
        }
        taken_s = along(by_pool, pool)
        if piece == 4096:
            return taken_s
        ours, theirs = (
            along({row["B"]: row["search_s"] for row in self.rows("pieces", piece=each)}, batch)
            for each in (4096, piece)
        )
        return taken_s * theirs / ours

    def enqueue_s(self, width: int, came: int) -> float:
        return along({row["G"]: row["enqueue_s"] for row in self.rows("enqueues", D=width)}, came)

    def loss_s(self, width: int, batch: int, gpus: int) -> float:
        """What a rank computes, in proportion to B at the same G; without the copies of its three gathers."""
        rows = self.rows("losses", D=width)
        alone = {row["B"] * row["W"]: row["loss_s"] - (3 * row["gather_s"] if row["W"] > 1 else 0.0) for row in rows}
        return along(alone, batch * gpus) * batch / rows[0]["B"]

    def gather_s(self, width: int, gpus: int) -> float:
        """Copies of one gather on the host and the device, the wire left out."""
        return along({row["W"]: row["gather_s"] for row in self.rows("losses", D=width)}, gpus) if gpus > 1 else 0.0

    def sharded_s(self, width: int, pool: int, batch: int, gpus: int) -> float:
        """Of a pool that is spread over the ranks: each searches the same B P as if it were whole, in fuller pieces, and
        sorts G W answers. Infinite where that did not fit into memory."""
        full = [row["W"] for row in self.found["sharded"] if row.get("out_of_memory")]
        if full and gpus >= min(full):
            return math.inf
        rows = sorted(self.rows("sharded"), key=lambda row: row["W"])
        fewest = rows[0]
        sorting = along({row["W"]: max(row["search_s"] - fewest["search_s"], 1e-6) for row in rows}, gpus)
        wider = self.search_s(width, 1 << 20, 4096) / self.search_s(fewest["D"], 1 << 20, 4096)
        return (wider * fewest["search_s"] * pool / fewest["P"] + sorting) * batch / fewest["B"]

    def defence_s(self, pool: int, batch: int) -> float:
        """What witnesses, gate and scout add to a plain step on a rank's cores: so much for B, and so much for B P."""
        few, many = self.rows("defences")
        slope = (many["defence_s"] - few["defence_s"]) / (many["P"] - few["P"])
        return (few["defence_s"] + slope * (pool - few["P"])) * batch / few["B"]

    def images_per_s(self, workers: float) -> float:
        """Decoded and tokenised by so many loaders of one rank."""
        return along({row["workers"]: row["images_per_s"] for row in self.found["loader"] if row["workers"]}, workers)


def along(points: Mapping[float, float], x: float) -> float:
    """Between points on straight lines of the logarithms; beyond the last in proportion to x; before the first as it."""
    known = sorted(points.items())
    if x <= known[0][0]:
        return known[0][1]
    for (low, before), (high, after) in pairwise(known):
        if x <= high:
            share = math.log(x / low) / math.log(high / low)
            return before * (after / before) ** share
    return known[-1][1] * x / known[-1][0]


# ---- a step -----------------------------------------------------------------------------------------------------


def parts(measured: Measured, job: Job) -> dict[str, float]:
    """Seconds of each of `PARTS` in a mean step."""
    kinds = {"plain": 1 - job.matched_frac, "matched": job.matched_frac}
    mixed = dict.fromkeys(PARTS[:6], 0.0)
    for kind, share in kinds.items():
        for part, seconds in _of_kind(measured, job, kind == "matched").items():
            mixed[part] += share * seconds if share else 0.0
    steps = min(job.checkpoint_every_steps, job.checkpoint_every_s / sum(mixed.values()))
    mixed["checkpoint"] = checkpoint_s(measured, job) / max(steps, 1.0)
    return mixed | {"loader": loader_s(measured, job), "store": store_s(job)}


def at_work_s(found: Mapping[str, float]) -> float:
    """A step without waiting for data."""
    return sum(found[part] for part in PARTS if part not in AHEAD)


def step_s(found: Mapping[str, float]) -> float:
    """A mean step of these parts."""
    return max(at_work_s(found), *(found[part] for part in AHEAD))


def bottleneck(found: Mapping[str, float], others: Sequence[str] = PARTS) -> str:
    """The part that a step waits for: the loader or the store where they cannot keep up, else the one of `others` that takes
    longest."""
    behind = [part for part in AHEAD if found[part] > at_work_s(found)]
    return max(behind or [part for part in others if part not in AHEAD], key=lambda part: found[part])


def images_per_s(measured: Measured, job: Job) -> float:
    return job.global_batch / step_s(parts(measured, job))


def efficiency(measured: Measured, job: Job) -> float:
    """Images a second of a GPU, as a share of what its towers alone would give: 1 is none lost to scale or the pool."""
    found = parts(measured, job)
    return found["towers"] / step_s(found)


def _of_kind(measured: Measured, job: Job, matched: bool) -> dict[str, float]:
    model, wire, G = measured.models[job.model], job.cluster.wire(job.gpus), job.global_batch
    width, step = model["D"], measured.step(job.model, job.batch, "matched" if matched else "plain")
    features, host_s = 4.0 * G * width, measured.gather_s(width, job.gpus) * job.gather_copies
    reduce_s = wire.all_reduce_s(gradient_bytes(model)) + wire.all_gather_s(gradient_bytes(model))
    gathers = 3 + 4  # images, texts and the pool's; keep, same caption, ids, valid
    gather_s = 3 * wire.all_gather_s(features) + 2 * wire.all_gather_s(8.0 * G) + 2 * wire.all_gather_s(1.0 * G)
    gather_s += (1 if matched else 2) * wire.all_reduce_s(features)  # matched captions are constants
    gather_s += SMALL_SUMS * wire.all_reduce_s(8.0)
    layer_s = wire.all_gather_s(4.0 * 1024 * job.gpus) + wire.all_reduce_s(
        4.0 * 1024
    )  # some 512 channels, forward and back
    return {
        "towers": step["step_s"] - step["loss_s"],
        "gradients": max(0.0, reduce_s - job.overlap_frac * step["backward_s"]),
        "gather": gather_s + gathers * host_s,
        "batch_norm": model["batch_norm_layers"] * layer_s,
        "loss": measured.loss_s(width, job.batch, job.gpus),
        "pool": measured.enqueue_s(width, G) + (search_s(measured, job, width) if matched else 0.0),
    }


def search_s(measured: Measured, job: Job, width: int) -> float:
    """The nearest captions of a rank's B images, its part of the wire included."""
    if not job.sharded:
        return measured.search_s(width, job.pool, job.batch, job.piece)
    wire, G = job.cluster.wire(job.gpus), job.global_batch
    queries, answers = 4.0 * G * width, 8.0 * G * job.gpus  # each rank gets each rank's answer to each query
    sent_s = wire.all_gather_s(queries) + 2 * wire.all_gather_s(answers) + wire.all_gather_s(8.0 * G)
    return measured.sharded_s(width, job.pool, job.batch, job.gpus) + sent_s + wire.all_reduce_s(queries)


def gradient_bytes(model: Mapping) -> float:
    """ZeRO 1 in bf16 sums gradients in bf16, and brings the new weights in it."""
    return (2.0 if model["precision"] == "bf16" else 4.0) * model["weights"]


def pool_bytes(measured: Measured, job: Job) -> float:
    """Of the ring on one rank: features in fp32, ids and steps."""
    width, ranks = measured.models[job.model]["D"], job.gpus if job.sharded else 1
    return job.pool * (4.0 * width / ranks + 16)


def checkpoint_s(measured: Measured, job: Job) -> float:
    """For which training stands still: a copy of the state and of the whole pool into rank 0's memory."""
    model, whole = measured.models[job.model], job.pool * (4.0 * measured.models[job.model]["D"] + 16)
    return model["checkpoint_still_s"] * (1 + whole / model["checkpoint_bytes"])


def loader_s(measured: Measured, job: Job) -> float:
    """For B images on the cores of one GPU."""
    return job.batch / measured.images_per_s(job.cluster.cores_per_gpu)


def store_s(job: Job) -> float:
    """For the bytes of G images when nothing lies in the nodes' caches yet: the first epoch."""
    nodes = -(-job.gpus // job.cluster.gpus_per_node)
    return job.global_batch * IMAGE_BYTES * fetched_times(nodes, job.streams) / job.cluster.store_bytes_per_s


def fetched_times(nodes: int, streams: int) -> float:
    """How many nodes fetch a tar: streams are dealt to ranks, and one that feeds several nodes has its tars on each."""
    return max(1.0, nodes / streams)
