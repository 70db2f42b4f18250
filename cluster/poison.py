"""`roclip poison`: clean shards or a clean URL list in, a poisoned copy with its ground truth out. For evaluation only.

    OUT/  *.tar *.parquet *.index.parquet manifest/   from shards: poisons replace clean pairs, so keys, order and number
                                                      of samples do not change
    OUT/  urls.parquet images/                        from a list: poisons are added rows, whose URL is `base_url` followed
                                                      by a file name under images/
    OUT/  poison.parquet labels.json                  ground truth (`roclip.data.ground_truth`) and the names of its classes
    OUT/  attack_eval.parquet                         triggered test images, where the config has evaluate.images

OUT is built beside its final path and renamed when it is complete. The source is only read.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.shard_copy import Shards, describe, suffix_of, write_shard
from ingest.lists.sources import read_url_list
from roclip.attacks import corpus, scenes
from roclip.attacks.poisons import Poison, labels_by_caption, plan_poisons, render, triggers_of
from roclip.config import Config
from roclip.data.ground_truth import TRUTH, write_parquet, write_truth
from roclip.data.shards import Manifest, sample_key
from roclip.errors import ConfigError
from roclip.storage import write_atomic

Say = Callable[[float, float, str], None]
"""Called with the samples done, their total, and a line of text."""


def poison_shards(config: Config, source: Path, out: Path, labels: Path | None, say: Say) -> dict[str, int]:
    """Write a poisoned copy of sealed shards; returns the number of poisons by attack.

    An image is taken to show what its caption names: pairs whose caption names exactly one class provide the images and captions
    of the attacks, the others are copied. `places` decides where the poisons go.

    Raises `ConfigError` for an `out` that is not empty or an attack for which the data does not suffice, `ShardError` for shards
    that cannot be read.
    """
    with _new_folder(out, source) as work:
        shards = Shards(source)
        classes = class_names(config, labels, source)
        captions = shards.captions()
        shown = pa.array(labels_by_caption(captions, classes), pa.string())
        table = pa.table({"caption": pa.array(captions, pa.string()), "label": shown})
        poisons = _plan(config, table, table, classes, len(table))
        contents = places(len(table), poisons, late=config.attacks.late, seed=config.seed)
        draw = _Drawer(config)
        truth: list[dict[str, Any]] = []

        def sample(key: str, content: int) -> dict[str, Any]:
            if content >= 0:
                return shards.sample(content)
            poison = poisons[-1 - content]
            image, row = draw(poison, shards.sample(poison.row)["image"], key)
            truth.append(row)
            return {"image": image, **describe(image, poison.caption)}

        done, started_s = 0, time.monotonic()
        for record in shards.records:
            keys, here = shards.keys(record), contents[done : done + record.samples].tolist()
            write_shard(work, record, keys, map(sample, keys, here), shards.failed(record))
            done += record.samples
            say(done, len(table), _progress(done, len(table), len(truth), started_s))
        _finish(config, work, truth, classes, poisons, lambda row: shards.sample(row)["image"])
        Manifest(work).finish({**(Manifest(source).summary or {}), "poisoned": len(truth)})
    return Counter(poison.attack for poison in poisons)


def poison_urls(config: Config, source: str, out: Path, labels: Path | None, base_url: str, say: Say) -> dict[str, int]:
    """Write a poisoned copy of a URL list and the images that its new rows name; returns the number of poisons by attack.

    The attacker's images are those of `data.images`, or rendered scenes. The classes of the list's rows come from
    `data.label_col` where a parquet has it, otherwise from the captions. In the ground truth `id` is the row of the new list, and
    `key` the sample's key when the list is ingested with the config's `ingest.samples_per_shard`.

    Raises the errors of `poison_shards`, and `UrlListError` for a list that cannot be read.
    """
    with _new_folder(out, Path(source)) as work:
        clean = read_url_list(source, url_col=config.data.url_col, caption_col=config.data.caption_col)
        known = _label_column(source, config.data.label_col)
        classes = class_names(config, labels, Path(source).parent, known)
        shown = known or labels_by_caption(clean["caption"].to_pylist(), classes)
        table = pa.table({"caption": clean["caption"], "label": pa.array(shown, pa.string())})
        images = corpus.attacker_images(config, classes, len(clean))
        poisons = _plan(config, table, images, classes, len(clean))
        total = len(clean) + len(poisons)
        rng = np.random.default_rng((config.seed, 5))
        rows = rng.permutation(len(poisons)) + len(clean)
        if not config.attacks.late:
            rows = rng.choice(total, len(poisons), replace=False)
        (work / "images").mkdir()
        draw = _Drawer(config)
        truth: list[dict[str, Any]] = []
        added, started_s = {}, time.monotonic()
        for row, poison in zip(rows.tolist(), poisons, strict=True):
            key = sample_key(row, config.ingest.samples_per_shard)
            image, found = draw(poison, images["image"][poison.row].as_py(), key)
            name = f"images/{row:08d}.{suffix_of(image)}"
            (work / name).write_bytes(image)
            added[row] = {"url": f"{base_url}{name}", "caption": poison.caption}
            truth.append({**found, "id": row})
            say(len(truth), len(poisons), _progress(len(truth), len(poisons), len(truth), started_s))
        honest = iter(clean.to_pylist())
        pairs = [added.get(row) or next(honest) for row in range(total)]
        write_parquet(work / "urls.parquet", pa.Table.from_pylist(pairs, schema=clean.schema))
        _finish(config, work, truth, classes, poisons, lambda row: images["image"][row].as_py())
    return Counter(poison.attack for poison in poisons)


def places(number: int, poisons: Sequence[Poison], *, late: bool, seed: int) -> np.ndarray:
    """The content of each of `number` places: n >= 0 for clean pair n, -1 - k for poison k.

    The first poison of an image takes the image's own place; further ones replace random clean pairs. With `late` poisons take
    the last places instead, and the clean pairs from there move to the images' places.
    """
    if len(poisons) > number:
        raise ConfigError(f"attacks: expected at most {number} poisons in {number} samples, got {len(poisons)}.")
    rng = np.random.default_rng((seed, 5))
    rows = np.array([poison.row for poison in poisons], dtype=np.int64)
    images, first = np.unique(rows, return_index=True)
    if late:
        taken = rng.permutation(len(rows)) + number - len(rows)
    else:
        taken = rows.copy()
        others = np.setdiff1d(np.arange(number), images)
        further = np.setdiff1d(np.arange(len(rows)), first)
        taken[further] = rng.choice(others, len(further), replace=False)
    contents = np.arange(number)
    freed = np.setdiff1d(images, taken)
    contents[freed] = rng.permutation(np.setdiff1d(taken, images))[: len(freed)]
    contents[taken] = -1 - np.arange(len(rows))
    return contents


def class_names(
    config: Config, labels: Path | None, beside: Path, known: Sequence[str | None] | None = None
) -> list[str]:
    """The class names for the attacks: those in the file `labels`, else the list's own (`known`), those of `evaluate.images`, of
    a labels.json beside the data, or of the rendered scenes. Raises `ConfigError` where there are none."""
    if labels is not None:
        return _read_labels(labels)
    if known:
        return corpus.frequent([label for label in known if label], config.evaluate.classes)
    if config.evaluate.images:
        return corpus.held_out_images(config)[1]
    for path in (beside / "labels.json", beside.parent / "origin" / "labels.json"):
        if path.is_file():
            return _read_labels(path)
    if config.data.scenes:
        return list(scenes.LABELS)
    raise ConfigError(
        "roclip poison: expected class names, found none. Give --labels FILE: a JSON list, or a text with one a line."
    )


class _Drawer:
    """Draws poisoned images, with their rows of the ground truth."""

    def __init__(self, config: Config):
        self.attacks, self.seed = config.attacks, config.seed
        self.triggers = triggers_of(config.attacks, config.seed)

    def __call__(self, poison: Poison, image: bytes, key: str) -> tuple[bytes, dict[str, Any]]:
        """The poisoned image, encoded, and its row of the ground truth without the id."""
        poisoned, box = render(poison, image, self.attacks, self.seed, self.triggers)
        names = ("attack", "group", "target_label", "source_label", "caption")
        row = {name: getattr(poison, name) for name in names}
        return poisoned, {**row, "key": key, "trigger_box": box and list(box)}


@contextlib.contextmanager
def _new_folder(out: Path, source: Path) -> Iterator[Path]:
    """A folder beside `out` that is renamed to `out` when the block succeeds. Raises `ConfigError` for an `out` with content."""
    final, clean = out.resolve(), source.resolve()
    if final == clean or clean in final.parents:
        raise ConfigError(
            f"--out {out}: expected a folder outside the clean data {source}, got one in it. Name another."
        )
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ConfigError(f"--out {out}: expected a new or empty folder, got one with content. Name another.")
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))
    try:
        yield work
        work.chmod(0o755)
        os.replace(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _plan(config: Config, clean: pa.Table, images: pa.Table, classes: list[str], rows: int) -> list[Poison]:
    try:
        poisons = plan_poisons(config.attacks, clean, images, labels=classes, seed=config.seed, rows=rows)
    except ValueError as error:
        raise ConfigError(f"attacks: {error}") from error
    if not poisons:
        raise ConfigError(
            "attacks: expected at least one attack, got none. Add one to attacks.backdoors, or set attacks.targeted.images."
        )
    return poisons


def _finish(
    config: Config,
    work: Path,
    truth: list[dict[str, Any]],
    classes: list[str],
    poisons: Sequence[Poison],
    image_of: Callable[[int], bytes],
) -> None:
    """Write ground truth, class names and, where there are test images, those that attack success is measured on."""
    write_truth(work / TRUTH, truth)
    write_atomic(work / "labels.json", json.dumps({"labels": classes}, indent=1))
    if config.evaluate.images:
        chosen = {poison.group: poison for poison in poisons if poison.attack == "targeted"}.values()
        rows = [
            {"attack": p.attack, "group": p.group, "image": image_of(p.row), "target_label": p.target_label}
            for p in chosen
        ]
        corpus.write_attack_evaluation(config, corpus.held_out_images(config)[0], rows, classes, work)


def _label_column(source: str, name: str) -> list[str | None] | None:
    """The classes of a list's rows, or None where it is not a parquet with this column."""
    if not source.endswith(".parquet") or not Path(source).is_file() or name not in pq.read_schema(source).names:
        return None
    return pq.read_table(source, columns=[name])[name].cast(pa.string()).to_pylist()


def _read_labels(path: Path) -> list[str]:
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
        names = found["labels"] if isinstance(found, dict) else found
        return sorted({str(name) for name in names if name})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected class names (a JSON list, or a text with one a line), got {error!r}."
        ) from error


def _progress(done: int, total: int, poisoned: int, started_s: float) -> str:
    seconds = max(time.monotonic() - started_s, 1e-9)
    left = f"  {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
    return f"{done}/{total} samples  {poisoned} poisoned  {done / seconds:.0f} samples/s{left}"
