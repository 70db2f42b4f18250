"""The tables and the plot of `scale.py`: which part of a step costs what, where it becomes the bottleneck."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from scale_model import (
    GPU_HOURS_BETWEEN_FAILURES,
    IMAGE_BYTES,
    LINKS,
    PARTS,
    Cluster,
    Job,
    Measured,
    at_work_s,
    bottleneck,
    checkpoint_s,
    efficiency,
    fetched_times,
    images_per_s,
    parts,
    pool_bytes,
    step_s,
)
from scale_sim import Failures, Fetching, goodput, slowest_rank, stalled_step_s, train_while_arriving

GPUS = [2**power for power in range(3, 11)]
POOLS = [2**power for power in range(16, 23)]
MODELS = ("RN50", "ViT-B-16")
INGEST_IMAGES_PER_CORE_S = 45.0
"""90 images/s on 2 cores (`tests/bench/ingest_rate.py --urls 2000`, `configs/experiments/results/bench.json`)."""
CONNECTION_BYTES_PER_S = 90e6
"""Of one request (Amazon S3, performance guidelines: 85 to 90 MB/s)."""
RESTART_S = 60.0
"""Killed node to training again: the bar of `tests/bench/recovery.py`."""
SAMPLES_PER_TAR = 10_000
COLORS = {
    "towers": "#e5e9f0",
    "gradients": "#1f6feb",
    "gather": "#7c3aed",
    "batch_norm": "#c026d3",
    "loss": "#a16207",
    "pool": "#d9622b",
    "checkpoint": "#64748b",
    "loader": "#0f766e",
    "store": "#be185d",
}


def size_text(number: float) -> str:
    return f"{number / 2**20:g}M" if number >= 2**20 else f"{number / 2**10:g}k"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def step_table(measured: Measured) -> str:
    """Milliseconds of the parts of a mean step, at the corners."""
    rows = []
    for model in MODELS:
        for gpus in (8, 64, 256, 1024):
            for pool in (2**16, 2**20, 2**22):
                job = Job(model, gpus, pool)
                found = parts(measured, job)
                rate = images_per_s(measured, job)
                cells = [_number(1e3 * found[part]) for part in PARTS]
                share = f"{100 * efficiency(measured, job):.0f} %"
                rows.append([model, gpus, size_text(pool), *cells, f"{rate:,.0f}", share, bottleneck(found)])
    return table(["model", "GPUs", "P", *(f"{part}, ms" for part in PARTS), "images/s", "efficiency", "longest"], rows)


def _number(value: float) -> str:
    return "does not fit" if math.isinf(value) else f"{value:.3g}"


def points(measured: Measured) -> str:
    """Where each part first costs a tenth of what the towers take, and where it takes longer than they do."""
    rows = []
    for model in MODELS:
        for link in LINKS:
            cluster = Cluster(link=link)
            for part in ("gradients", "gather", "batch_norm", "loss"):
                taken = {gpus: _share(measured, Job(model, gpus, cluster=cluster), part) for gpus in GPUS}
                rows.append([model, link, part, *_first(taken, lambda gpus: f"{gpus} GPUs")])
        for text, job in WAYS.items():
            for gpus in (8, 1024):
                taken = {p: _share(measured, replace(job, model=model, gpus=gpus, pool=p), "pool") for p in POOLS}
                rows.append([model, f"{gpus} GPUs, {text}", "pool", *_first(taken, lambda p: f"P = {size_text(p)}")])
        taken = {p: measured.defence_s(p, 256) / parts(measured, Job(model, 8))["towers"] for p in (21_845, *POOLS)}
        rows.append(
            [model, "neighbours and sample filter, on 8 cores a GPU", "defence", *_first(taken, lambda p: f"P = {p:,}")]
        )
        for store, streams in ((12.5e9, 16), (12.5e9, 1024), (100e9, 16), (100e9, 1024)):
            cluster = Cluster(store_bytes_per_s=store)
            found = {g: parts(measured, Job(model, g, streams=streams, cluster=cluster)) for g in GPUS}
            taken = {gpus: each["store"] / at_work_s(each) for gpus, each in found.items()}
            case = f"store of {store / 1e9:g} GB/s, data.streams={streams}"
            rows.append([model, case, "store", "-", _first(taken, lambda gpus: f"{gpus} GPUs")[1]])
        rate, cluster = {gpus: images_per_s(measured, Job(model, gpus)) for gpus in GPUS}, Cluster()
        came = cluster.ingest_cores * INGEST_IMAGES_PER_CORE_S
        for epochs in (1, 32):
            taken = {gpus: rate[gpus] / epochs / came for gpus in GPUS}
            case = f"{cluster.ingest_cores:,} ingest cores, each image {epochs} times"
            rows.append([model, case, "ingest", "-", _first(taken, lambda gpus: f"{gpus} GPUs")[1]])
    return table(["model", "with", "part", "a tenth of the towers from", "the bottleneck from"], rows)


WAYS = {
    "as the product (above 1M sharded)": Job("", 8),
    "whole on each GPU": Job("", 8, shard_above=2**22),
    "whole, every step matched": Job("", 8, shard_above=2**22, matched_frac=1.0),
    "whole, 65,536 captions at a time": Job("", 8, shard_above=2**22, piece=65_536),
}
"""Of searching the pool; the last is not what the product does."""


def _share(measured: Measured, job: Job, part: str) -> float:
    found = parts(measured, job)
    return found[part] / found["towers"]


def _first(taken: dict[int, float], text: Callable[[int], str]) -> list[str]:
    """The first size at which the share passes 0.1, and 1."""
    return [next((text(size) for size, share in taken.items() if share >= least), "not here") for least in (0.1, 1.0)]


def simulations(measured: Measured) -> str:
    """What means hide, at a pool of 65,536 and 400 Gb/s a GPU."""
    rows = []
    for model in MODELS:
        steps = [
            [s / median(row["step_s"]) for s in row["step_s"]]
            for row in measured.rows("steps", model=model)
            if row["B"] >= 128
        ]
        for gpus in (8, 64, 256, 1024):
            random, job = np.random.default_rng(0), Job(model, gpus)
            mean_s = step_s(parts(measured, job))
            slowest = slowest_rank(np.concatenate(steps), gpus, random)
            given = measured.models[model]
            failures = Failures(
                GPU_HOURS_BETWEEN_FAILURES,
                min(job.checkpoint_every_s, job.checkpoint_every_steps * mean_s),
                checkpoint_s(measured, job),
                given["checkpoint_written_s"],
                RESTART_S,
            )
            rows.append(
                [
                    model,
                    gpus,
                    f"{slowest:.3f}",
                    f"{100 * goodput(gpus, failures, random):.2f} %",
                    *(f"{_stall(job, mean_s, *how, random) / mean_s:.2f}" for how in FETCHES.values()),
                ]
            )
    return table(["model", "GPUs", "slowest rank / median", "goodput under failures", *FETCHES], rows)


FETCHES = {
    "step / without store: no workers": (0, False),
    "4 workers": (8, False),
    "4 workers, next tar fetched ahead": (8, True),
}
"""Batches that a loader is ahead, and whether tars are fetched ahead, which the product does not do."""


def _stall(job: Job, mean_s: float, ahead: int, tars_ahead: bool, random: np.random.Generator) -> float:
    nodes = -(-job.gpus // job.cluster.gpus_per_node)
    streams = max(16, job.gpus)
    fetching = Fetching(
        job.gpus,
        streams,
        SAMPLES_PER_TAR,
        SAMPLES_PER_TAR * IMAGE_BYTES,
        job.cluster.store_bytes_per_s,
        CONNECTION_BYTES_PER_S,
        job.cluster.store_first_byte_s,
        ahead,
        fetched_times(nodes, streams),
        tars_ahead,
    )
    return stalled_step_s(mean_s, job.global_batch, fetching, random)


def arrivals(measured: Measured, images: float = 4e8, epochs: int = 32) -> str:
    """A training that begins when a share of LAION-400M is there, beside 1,600 ingest cores."""
    rows, came = [], Cluster().ingest_cores * INGEST_IMAGES_PER_CORE_S
    for gpus in (8, 64, 256, 1024):
        rate = images_per_s(measured, Job("ViT-B-16", gpus))
        for start in (0.01, 0.5, 1.0):
            went = train_while_arriving(images, came, rate, epochs, start)
            cells = [f"{went.hours:.0f} h", f"{100 * went.seen_frac:.0f} %", f"{100 * went.samples_frac:.0f} %"]
            rows.append([gpus, f"{100 * start:.0f} %", *cells])
    return table(
        ["GPUs", "begun with", "training ends after", "data in the last epoch", "of 32 epochs x all data"], rows
    )


def fixed_batch(measured: Measured, pairs: int = 32_768) -> str:
    """The same global batch on more GPUs; efficiency against the largest local batch's towers."""
    rows = []
    for model in MODELS:
        largest = max(row["B"] for row in measured.rows("steps", model=model))
        alone = largest / parts(measured, Job(model, 1, batch=largest))["towers"]
        for gpus in (64, 128, 256, 1024):
            job = Job(model, gpus, batch=pairs // gpus)
            found, rate = parts(measured, job), images_per_s(measured, job)
            cells = [f"{1e3 * found['towers']:.0f}", f"{1e3 * step_s(found):.0f}", f"{rate:,.0f}"]
            rows.append([model, gpus, job.batch, *cells, f"{100 * rate / gpus / alone:.0f} %", bottleneck(found)])
    return table(["model", "GPUs", "B", "towers, ms", "step, ms", "images/s", "efficiency", "longest"], rows)


def memory(measured: Measured) -> str:
    rows = []
    for model in MODELS:
        for pool in (2**16, 2**20, 2**22):
            cells = [f"{pool_bytes(measured, Job(model, gpus, pool)) / 1e9:.2f} GB" for gpus in (8, 1024)]
            rows.append([model, size_text(pool), f"{pool_bytes(measured, Job(model, 1, pool)) / 1e9:.2f} GB", *cells])
    return table(["model", "P", "pool, whole", "sharded above 1M: 8 GPUs", "1,024 GPUs"], rows)


def checked(found: dict) -> str:
    """Predicted against measured, of two gloo ranks."""
    rows = []
    for row in found["ranks"]:
        alone, formula = (row["cut_s"] + row[name] for name in ("collectives_s", "formula_s"))
        rows.append(
            [
                row["model"],
                row["kind"],
                f"{row['cut_s']:.2f} s",
                f"{row['collectives_s']:.2f} s",
                f"{row['step_s']:.2f} s",
            ]
            + [
                f"{t:.2f} s ({100 * e:+.0f} %)"
                for t, e in ((alone, row["error_alone_frac"]), (formula, row["error_formula_frac"]))
            ]
        )
    head = ["model", "step", "computing", "its collectives alone", "measured", "predicted", "predicted by the formula"]
    return table(head, rows)


def plot(measured: Measured, path: Path) -> None:
    """Efficiency over GPUs by link and pool, and over GPUs and P which part costs most after the towers."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scale", "font.size": 7.5}):
        figure = Figure(figsize=(7.4, 6.4), layout="constrained")
        upper, lower = figure.subplots(2, 2)
        shown = set()
        for axes, model in zip(upper, MODELS, strict=True):
            _lines(axes, measured, model)
        for axes, model in zip(lower, MODELS, strict=True):
            shown |= _map(axes, measured, model)
        lines = upper[0].get_lines()
        figure.legend(handles=lines, loc="outside upper center", ncols=3, frameon=False, fontsize=7)
        handles = [Patch(color=COLORS[part], label=part) for part in PARTS if part in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=7.5)
        figure.savefig(path, metadata={"Date": None})


def _lines(axes, measured: Measured, model: str) -> None:
    cases = [(f"{link}, P = 64k", Job(model, 8, cluster=Cluster(link=link)), "-") for link in LINKS]
    cases += [
        (f"400 Gb/s a GPU, P = {size_text(p)}, whole", Job(model, 8, p, shard_above=2**22), "--")
        for p in (2**20, 2**22)
    ]
    cases += [
        (
            "the same in larger pieces, gathers not copied",
            Job(model, 8, 2**22, 256, shard_above=2**22, gather_copies=False, piece=65_536),
            ":",
        )
    ]
    colors = ("#1f6feb", "#0f766e", "#a16207", "#d9622b", "#7c3aed", "#475569")
    for (label, job, style), color in zip(cases, colors, strict=True):
        shares = [100 * efficiency(measured, replace(job, gpus=gpus)) for gpus in GPUS]
        axes.plot(GPUS, shares, style, marker=".", color=color, label=label, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
    axes.set_ylim(0, 102)
    axes.set_title(f"{model}: images/s of a GPU,\nas % of what its towers alone would give")
    axes.set_xlabel("GPUs, 256 pairs each")
    axes.grid(color="#e6e6e6")


def _map(axes, measured: Measured, model: str) -> set[str]:
    """Colour: what costs most after the towers; framed: it takes longer than they do. Number: efficiency in percent."""
    from matplotlib.patches import Rectangle

    shown = set()
    for column, gpus in enumerate(GPUS):
        for row, pool in enumerate(POOLS):
            found = parts(measured, Job(model, gpus, pool))
            worst = bottleneck(found, PARTS[1:])
            first = bottleneck(found) != "towers"
            shown.add(worst)
            axes.add_patch(Rectangle((column, row), 0.96, 0.94, color=COLORS[worst], alpha=0.9 if first else 0.35))
            share = 100 * found["towers"] / step_s(found)
            text = "full" if math.isinf(step_s(found)) else f"{share:.0f}"
            color = "white" if first else "#1e293b"
            axes.text(column + 0.48, row + 0.47, text, ha="center", va="center", fontsize=6.5, color=color)
    axes.set_xlim(0, len(GPUS))
    axes.set_ylim(0, len(POOLS))
    axes.set_xticks([column + 0.48 for column in range(len(GPUS))], [f"{gpus:,}" for gpus in GPUS])
    axes.set_yticks([row + 0.47 for row in range(len(POOLS))], [size_text(pool) for pool in POOLS])
    axes.tick_params(length=0)
    axes.set_title(f"{model}: what costs most after the towers\n(dark: more than they do; number: efficiency in %)")
    axes.set_xlabel("GPUs, 400 Gb/s each")
    axes.set_ylabel("captions in the pool")
    for side in axes.spines.values():
        side.set_visible(False)
    return shown
