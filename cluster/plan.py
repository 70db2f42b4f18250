"""What a config would do: rows, shards, steps, phases and bytes, planned without torch and without downloads.

Counts of rows come from parquet footers; other lists are estimated from their beginning. Everything that depends on how
many URLs still answer is an upper bound.
"""

import contextlib
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ingest.lists.files import ListFile, find_files, open_text
from ingest.lists.formats import read_head
from ingest.lists.sources import open_configured_list
from roclip.config import Config, dump_config, model_file, run_directory
from roclip.data.shards import Manifest
from roclip.data.tar_sources import estimated_samples, is_pattern
from roclip.errors import ConfigError, DataError, UrlListError

DOWNLOAD_BYTES = 130_000
"""Bytes fetched for an image: img2dataset's README measures about 130 MB/s at 1000 images/s."""
STORED_BYTES = 30_000
"""Bytes of a stored 256-px JPEG with its caption: img2dataset's README gives about 30 GB for a million."""
FORMAT_FACTOR = {"jpg": 1.0, "webp": 0.7, "png": 4.0}
CHECKPOINT_BYTES = 20
"""Bytes of one parameter in a checkpoint: exported weight, engine's weight, optimizer's fp32 copy, two moments."""
_PROBE_BYTES = 1 << 20
"""Bytes to read from a file whose number of rows only reading can tell."""


@dataclass(frozen=True)
class RunPlan:
    """The size of a run. Steps and samples are upper bounds; what depends on unknown rows is None."""

    rows: int | None
    """URLs, poisons included; None while the list does not exist."""
    problem: str
    """Why the rows are unknown; empty if they are known."""
    exact: bool
    """False if `rows` is estimated from the beginning of a list."""
    shards: int | None
    """Shards that ingest will write; None if unknown, or if they exist already."""
    elsewhere: bool
    """Whether the shards are stored outside the run directory."""
    steps_per_epoch: int | None
    steps: int | None
    """Optimizer steps of one arm."""
    matched: tuple[int, ...]
    """Epochs, from 1, with steps in which the arm `roclip` gives images other captions than their own."""
    gated: tuple[int, ...]
    """Epochs with steps in which the sample filter suspects pairs."""
    parameters: int | None
    """Parameters of both towers; None for towers that are not open_clip's own."""
    embed_dim: int
    """Width D of the features."""
    ranks: int
    batch_per_rank: int
    pool_bytes: int
    download_bytes: int | None
    shard_bytes: int | None
    checkpoint_bytes: int | None
    """Bytes of all checkpoints that are on disk at the same time, over all arms."""

    @property
    def disk_bytes(self) -> int:
        """Bytes that the run directory needs, as far as they are known."""
        return (0 if self.elsewhere else self.shard_bytes or 0) + (self.checkpoint_bytes or 0)


def make_plan(config: Config) -> RunPlan:
    """Plan a run. Raises `ConfigError` for an unknown model; missing data becomes a `problem`."""
    model = model_config(config)
    rows, exact, problem = None, False, ""
    try:
        rows, exact = count_rows(config)
    except DataError as error:
        problem = str(error)
    train, ingest = config.train, config.ingest
    last = train.global_batch_size - 1 if config.data.last_batch == "pad" else 0
    steps_per_epoch = None if rows is None else (rows + last) // train.global_batch_size
    weight_count = parameters(model)
    pool_bytes = config.pool.size * (model["embed_dim"] * 4 + 8) if "roclip" in config.arms else 0
    scale = (ingest.image_size / 256) ** 2 * FORMAT_FACTOR[ingest.encode_format]
    kept = train.keep_checkpoints + 2  # the one that is being written, and the trusted one
    return RunPlan(
        rows=rows,
        problem=problem,
        exact=exact,
        shards=None if rows is None or not config.data.fetches else math.ceil(rows / ingest.samples_per_shard),
        elsewhere=bool(config.data.shards),
        steps_per_epoch=steps_per_epoch,
        steps=None if steps_per_epoch is None else steps_per_epoch * train.epochs,
        matched=tuple(e for e in range(1, train.epochs + 1) if "matched" in phases(config, e, steps_per_epoch)),
        gated=filtered_epochs(config, steps_per_epoch),
        parameters=weight_count,
        embed_dim=model["embed_dim"],
        ranks=config.cluster.workers,
        batch_per_rank=-(-train.global_batch_size // config.cluster.workers),
        pool_bytes=pool_bytes,
        download_bytes=0 if not config.data.urls else None if rows is None else rows * DOWNLOAD_BYTES,
        shard_bytes=0 if not config.data.fetches else None if rows is None else round(rows * STORED_BYTES * scale),
        checkpoint_bytes=None
        if weight_count is None
        else kept * (weight_count * CHECKPOINT_BYTES * len(config.arms) + pool_bytes),
    )


def phases(config: Config, epoch: int, steps_per_epoch: int | None) -> set[str]:
    """Kinds of steps of the arm `roclip` in an epoch, from 1: 'matched', 'plain' or both, as `roclip.defence.defence` decides."""
    schedule, kinds = config.pool.schedule, set()
    for at in schedule.turns(epoch, steps_per_epoch or 1, config.train.global_batch_size):
        by_neighbour = config.pool.neighbours and at.done(schedule.warmup.unit) < schedule.warmup.amount
        kinds.add("matched" if by_neighbour else schedule.phase(at))
    return kinds


def filtered_epochs(config: Config, steps_per_epoch: int | None) -> tuple[int, ...]:
    """Epochs in which the sample filter suspects pairs in at least one step: without neighbours, the pool must be full first."""
    gated, captions = [], 0
    if not any(config.pool.filter_frac) or "roclip" not in config.arms:
        return ()
    for epoch in range(1, config.train.epochs + 1):
        kinds = phases(config, epoch, steps_per_epoch)
        steps = config.pool.size if steps_per_epoch is None else steps_per_epoch
        if "matched" in kinds or config.pool.update == "always":
            captions += steps * config.train.global_batch_size
        if "plain" in kinds and (config.pool.neighbours or captions > config.pool.size):
            gated.append(epoch)
    return tuple(gated)


def count_rows(config: Config) -> tuple[int, bool]:
    """Number of rows of the data source, with its poisons, and whether it is exact. Raises `UrlListError`."""
    data = config.data
    if data.scenes:
        rows, exact = data.scenes, True
    elif data.urls or data.images:
        rows, exact = _list_rows(config)
        rows = min(rows, data.limit) if data.limit else rows
    elif is_pattern(data.shards):
        rows, exact = estimated_samples(data.shards), False
    else:
        records = Manifest(data.shards).records()
        if not records:
            raise UrlListError(f"data.shards: expected a folder with a manifest, got {data.shards}. Ingest it first.")
        return sum(record.samples for record in records), True
    if not data.urls:
        rows += config.attacks.pairs(rows)
    return rows, exact


def model_config(config: Config) -> dict[str, Any]:
    """The model's JSON, which comes with the preset or with open_clip. Raises `ConfigError` if neither has it."""
    path = model_file(config)
    if path is None:
        spec = importlib.util.find_spec("open_clip")
        folders = list(spec.submodule_search_locations or ()) if spec else []
        known = {file.stem: file for folder in folders for file in Path(folder, "model_configs").glob("*.json")}
        if config.model.name not in known:
            raise ConfigError(
                f"model.name: expected one of open_clip's {len(known)} models or "
                f"models/{config.model.name}.json beside {config.source or 'the preset'}, got neither."
            )
        path = known[config.model.name]
    return json.loads(path.read_text())


def parameters(model: dict[str, Any]) -> int | None:
    """Number of parameters of open_clip's own towers (ViT, ModifiedResNet, text); None for other towers."""
    vision, text, out = model["vision_cfg"], model["text_cfg"], model["embed_dim"]
    if "timm_model_name" in vision or "hf_model_name" in text or "multimodal_cfg" in model:
        return None
    width, context = text.get("width", 512), text.get("context_length", 77)
    rows = text.get("vocab_size", 49408) + context
    total = rows * width + _transformer(text.get("layers", 12), width, 4) + 2 * width + width * out + 1
    size, width = vision.get("image_size", 224), vision.get("width", 768)
    if isinstance(vision.get("layers", 12), list):
        return total + _resnet(vision["layers"], width, size, out)
    patch = vision.get("patch_size", 16)
    tokens = (size // patch) ** 2 + 1
    blocks = _transformer(vision.get("layers", 12), width, vision.get("mlp_ratio", 4))
    return total + (3 * patch**2 + 1 + tokens + 4 + out) * width + blocks


def show_plan(console: Console, config: Config, plan: RunPlan, stages: list[str]) -> None:
    """Print the resolved config, the plan and the steps of a command."""
    console.print(dump_config(config).rstrip(), markup=False, highlight=False, soft_wrap=True)
    console.print()
    table = Table(title=f"Plan of {config.name}", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _lines(config, plan):
        table.add_row(name, value)
    console.print(table)
    console.print()
    console.print("[bold]Steps[/] (nothing was done)")
    for number, stage in enumerate(stages, 1):
        console.print(f"  {number}. {stage}", markup=False, highlight=False, soft_wrap=True)


def stages_of(config: Config, plan: RunPlan, command: str) -> list[str]:
    """What a command would do, in order, as sentences."""
    data, arms = config.data, " and ".join(config.arms)
    if data.urls:
        source = f"read the URL list {data.urls}"
    elif data.images or data.scenes:
        what = data.images or f"{data.scenes:,} rendered scenes"
        source = f"serve {what} as a URL list from a loopback origin, poisons included"
    else:
        source = f"{'index the tars' if is_pattern(data.shards) else 'read the manifest'} of {data.shards}"
    shards = "shards" if plan.shards is None else f"{plan.shards:,} shards"
    ingest = f"ingest {shards} of up to {config.ingest.samples_per_shard:,} samples"
    if config.data.shards:
        ingest += f" into {config.data.shards}"
    if not config.data.fetches:
        ingest = "ingest nothing: the shards are there"
    steps = "as many steps as the list gives" if plan.steps is None else f"{plan.steps:,} steps each"
    segmenter = config.oracle.weights or f"train a segmenter on {config.oracle.trusted:,} trusted images"
    by_command = {
        "ingest": [source, ingest],
        "train": [f"train {arms}: {steps}, on {_ranks(plan.ranks)}"],
        "evaluate": [f"evaluate the newest checkpoint of {arms}: zero-shot, linear probe, retrieval, attack success"],
        "oracle": [f"oracle: {segmenter}, then check {arms}; a clean checkpoint becomes TRUSTED", *_repair(config)],
        "export": [f"export a checkpoint of {arms} in open_clip's format"],
    }
    if command != "run":
        return by_command[command]
    order = ("ingest", "train", "evaluate", "oracle")
    return [*(stage for name in order for stage in by_command[name]), "write summary.json and report.html"]


def _repair(config: Config) -> list[str]:
    if not config.repair.enabled:
        return []
    share = f"{100 * config.repair.set_frac:g} % of the images"
    return [f"repair what is poisoned or suspicious on at most {share}, and check it again; TRUSTED if nothing is left"]


def human_bytes(count: int | None) -> str:
    """A number of bytes for people: 1.5 GB; 'unknown' for None."""
    if count is None:
        return "unknown"
    value, unit = float(count), 0
    while value >= 1000 and unit < 5:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {' kMGTP'[unit]}B"


def _lines(config: Config, plan: RunPlan) -> list[tuple[str, str]]:
    about = "" if plan.exact or plan.rows is None else "about "
    download, shards = "none", "those that are there"
    if config.data.urls:
        hours = "" if plan.rows is None else f"; {about}{_duration(plan.rows / 1000)} at 1000 images/s"
        download = human_bytes(plan.download_bytes) + hours
    if config.data.fetches:
        shards = f"{about}{_count(plan.shards)}, {human_bytes(plan.shard_bytes)} (estimate)"
    lines = [
        ("run directory", str(run_directory(config))),
        ("URLs", about + _count(plan.rows) + f" ({plan.problem})" * bool(plan.problem)),
        ("download", download),
        ("shards", shards),
        ("model", f"{config.model.name}, D = {plan.embed_dim}, {_count(plan.parameters)} parameters"),
        ("ranks", f"{plan.ranks}, {plan.batch_per_rank} of {config.train.global_batch_size} pairs each"),
        ("steps", f"at most {_count(plan.steps_per_epoch)} an epoch, {_count(plan.steps)} an arm"),
        ("samples", f"at most {_count(plan.rows)} an epoch, {config.train.epochs} epochs"),
        ("arms", ", ".join(config.arms)),
    ]
    if "roclip" in config.arms:
        lines += [
            ("matched epochs", _ranges(plan.matched)),
            ("gated epochs", _ranges(plan.gated)),
            ("caption pool", f"{config.pool.size:,} captions, {human_bytes(plan.pool_bytes)} on every rank"),
        ]
    lines += [
        ("checkpoints", f"{human_bytes(plan.checkpoint_bytes)} at a time (estimate)"),
        (
            "bytes on disk",
            f"about {human_bytes(plan.disk_bytes)} in all"
            + ", without the shards" * (plan.rows is None or (plan.elsewhere and config.data.fetches)),
        ),
    ]
    return lines


def _list_rows(config: Config) -> tuple[int, bool]:
    """Number of rows of the list, and whether it is exact or extrapolated from the first rows."""
    if config.data.images:
        return _image_rows(config.data.images), True
    source = open_configured_list(config, config.data.urls)
    if source.rows is not None:
        return source.rows, True
    counts = [_file_rows(file) for file in find_files(config.data.urls)]
    return sum(lines for lines, _ in counts), all(exact for _, exact in counts)


def _file_rows(file: ListFile) -> tuple[int, bool]:
    """Number of rows of a file: by a parquet's footer, otherwise by its lines, extrapolated from the first ones if it is long."""
    if (rows := read_head(file).rows) is not None:
        return rows, True
    taken: list[int] = []
    with contextlib.closing(open_text(file, taken.append)) as stream:
        head = stream.read(_PROBE_BYTES)
    exact = len(head) < _PROBE_BYTES
    lines = head.count(b"\n") + (not head.endswith(b"\n") and bool(head))
    header = file.format in ("csv", "tsv")
    return max(0, lines - header if exact else round(lines * file.size_bytes / max(sum(taken), 1))), exact


def _image_rows(path: str) -> int:
    import fsspec  # here, so that `roclip --help` does not pay for it
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with fsspec.open(path, "rb") as file:
            return pq.read_metadata(file).num_rows
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UrlListError(f"{path}: expected a parquet of images, got {error}. Check the path.") from error


def _transformer(layers: int, width: int, mlp_ratio: float) -> int:
    hidden = int(width * mlp_ratio)
    return layers * (4 * width**2 + 4 * width + 2 * width * hidden + hidden + width + 4 * width)


def _resnet(layers: list[int], width: int, size: int, out: int) -> int:
    half = width // 2
    total = 27 * half + 9 * half**2 + 9 * half * width + 4 * half + 2 * width
    inner = width
    for stage, blocks in enumerate(layers):
        planes = width * 2**stage
        for block in range(blocks):
            total += inner * planes + 9 * planes**2 + 4 * planes**2 + 12 * planes
            total += 0 if block else 4 * inner * planes + 8 * planes
            inner = 4 * planes
    tokens = (size // 32) ** 2 + 1
    return total + tokens * inner + 3 * (inner**2 + inner) + inner * out + out


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _ranks(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)}"


def _ranges(numbers: tuple[int, ...]) -> str:
    """Epochs as a short list, such as '2, 4, 6' or '2, 4, 6, … 24'."""
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:4], f"… {shown[-1]} ({len(shown)} in all)"]) or "none"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
