"""Images/s out of the same tars, with the same transforms and workers: our stream against open_clip's `get_wds_dataset`.

256-px JPEGs with captions, to a random resized crop (scale 0.9 to 1) of 224 px, normalised, and tokens. Theirs does all of
it image by image in the loader; ours decodes and tokenises there, and crops and normalises the whole batch after it. One
thread a process for both. Then a resume in mid-epoch: seconds to the first batch by our index, against reading the tars with
webdataset and dropping, undecoded, what was seen.

    python tests/bench/loader.py [--quick]
"""

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import open_clip
import open_clip_train.data
import torch
import webdataset as wds
from bench import measure
from webdataset.tariterators import tar_file_expander

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from kit import write_shard

from roclip.attacks import scenes
from roclip.config import AugmentConfig
from roclip.data.augment import augment
from roclip.data.reader import decode
from roclip.data.shards import Manifest
from roclip.data.stream import Stream, StreamSettings, take_snapshot

BATCH, SIZE, STORED = 64, 224, 256
CROP = AugmentConfig(crop_scale=(0.9, 1.0), flip=0.0, jitter=0.0, hue=0.0, gray=0.0, blur=0.0)
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))


# open_clip 3.3 does not know the mark that webdataset 0.2.111 puts at the end of each tar, and stops with a KeyError
open_clip_train.data.tar_file_expander = partial(tar_file_expander, eof_value=None)


def make_tars(root: Path, shards: int, per_shard: int) -> None:
    """Tars of the same pictures under different keys: what is measured does not look at them."""
    rendered = [scenes.render(each, seed=0, size_px=STORED) for each in range(per_shard)]
    samples = [(scenes.encode(scene.image, "jpeg"), scene.caption) for scene in rendered]
    for number in range(shards):
        write_shard(root, number, samples, per_shard)


def forget(root: Path) -> None:
    """Let the system drop the pages that it keeps of the tars and their indexes."""
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def our_stream(root: Path, tokenizer, workers: int) -> Stream:
    return Stream(
        root,
        StreamSettings(STORED, BATCH, seed=0, streams=16, shuffle_buffer=1024, workers=workers),
        tokenize=lambda captions: tokenizer(list(captions)),
    )


def our_rate(root: Path, tokenizer, workers: int) -> float:
    stream = our_stream(root, tokenizer, workers)
    snapshot = take_snapshot(Manifest(root))
    start, seen = time.perf_counter(), 0
    for batch in stream.epoch(snapshot, 1):
        pixels = augment(batch.images, batch.ids, CROP, seed=0, epoch=1, size=SIZE)
        seen += len(pixels.sub_(MEAN).div_(STD))
    return seen / (time.perf_counter() - start)


def their_rate(root: Path, tokenizer, workers: int, samples: int, preprocess) -> float:
    tars = sorted(map(str, root.glob("*.tar")))
    args = SimpleNamespace(
        train_data=f"{root}/{{00000..{len(tars) - 1:05d}}}.tar",
        train_num_samples=samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
    )
    loader = open_clip_train.data.get_wds_dataset(
        args, preprocess, is_train=True, floor=True, tokenizer=tokenizer
    ).dataloader
    start, seen = time.perf_counter(), 0
    for images, _ in loader:
        seen += len(images)
    return seen / (time.perf_counter() - start)


def our_resume(root: Path, tokenizer, step: int) -> float:
    forget(root)
    start = time.perf_counter()
    next(our_stream(root, tokenizer, 0).epoch(take_snapshot(Manifest(root)), 1, first_step=step))
    return time.perf_counter() - start


def skip_by_reading(root: Path, tokenizer, step: int) -> float:
    forget(root)
    start = time.perf_counter()
    samples = iter(wds.WebDataset(sorted(map(str, root.glob("*.tar"))), shardshuffle=False))
    for _ in range(step * BATCH):
        next(samples)
    batch = [next(samples) for _ in range(BATCH)]
    tokenizer([sample["txt"].decode() for sample in batch])
    for sample in batch:
        decode(sample["png"], STORED)
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    shards, per_shard = (4, 128) if arguments.quick else (16, 256)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    preprocess = open_clip.image_transform(SIZE, is_train=True, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_tars(root, shards, per_shard)
        for workers in (0, 1, 2):
            measure(
                "loader",
                f"{STORED} px JPEG to {SIZE} px, {workers} workers",
                "images/s",
                lambda workers=workers: our_rate(root, tokenizer, workers),
                lambda workers=workers: their_rate(root, tokenizer, workers, shards * per_shard, preprocess),
                1.3,
                runs=3,
                lower_is_better=False,
            )
        if not arguments.quick:
            shards, per_shard = 64, 1024
            make_tars(root, shards, per_shard)
        step = shards * per_shard // BATCH // 2
        measure(
            "loader",
            f"resume after {step * BATCH:,} samples",
            "s",
            lambda: our_resume(root, tokenizer, step),
            lambda: skip_by_reading(root, tokenizer, step),
            10.0,
            runs=5,
        )
