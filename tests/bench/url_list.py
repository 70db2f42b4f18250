"""Walking a URL list: all its parts of 10,000 rows, each pickled as Ray would take it, in a process of its own.

10,000,000 rows of a parquet and 1,000,000 of a csv.gz against budgets: 2 GiB, and 100,000 rows a second, ten times what the
largest published crawl fetched. And 1,000,000 rows against img2dataset's reader, which writes each part to a feather file;
there memory is what the walk takes above the imports.

    python tests/bench/url_list.py [--quick]
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from bench import measure
from pyarrow import csv

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package first: a bench beside this one is called ingest

SAMPLES_PER_SHARD = 10_000
PIECE_ROWS = 500_000
BUDGET_ROWS_PER_S = 100_000


def make(path: Path, rows: int) -> None:
    """A list with short random URLs and captions."""
    pieces = (_piece(first, min(PIECE_ROWS, rows - first)) for first in range(0, rows, PIECE_ROWS))
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, _piece(0, 0).schema) as writer:
            for piece in pieces:
                writer.write_table(piece)
        return
    with pa.CompressedOutputStream(str(path), "gzip") as sink, csv.CSVWriter(sink, _piece(0, 0).schema) as writer:
        for piece in pieces:
            writer.write_table(piece)


def ours(path: Path, scratch: Path) -> int:
    from ingest.lists.sources import open_list

    return sum(len(part.table) for part in open_list(str(path)).parts(SAMPLES_PER_SHARD) if len(pickle.dumps(part)) > 0)


def peer(path: Path, scratch: Path) -> int:
    """img2dataset's reader; each feather file goes when it is taken, as its downloader does it."""
    kind = path.name.partition(".")[2]
    with contextlib.redirect_stdout(io.StringIO()):
        reader = _reader().Reader(
            str(path), kind, "url", "caption", None, None, None, SAMPLES_PER_SHARD, set(), str(scratch)
        )
        rows = 0
        for _, feather in reader:
            with pa.memory_map(feather) as file:
                rows += pa.ipc.open_file(file).read_all().num_rows
            os.remove(feather)
    return rows


def child(side: str, path: Path, rows: int) -> None:
    """Walk, and print seconds, peak bytes and bytes above the imports."""
    _reader()  # both import the same: pandas too, which img2dataset needs and pyarrow takes where it is
    importlib.import_module("ingest.lists.sources")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        found = {"ours": ours, "peer": peer}[side](path, Path(scratch))
        wall_s = time.perf_counter() - start
    assert found == rows, (found, rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"s": wall_s, "bytes": peak, "more_bytes": max(peak - before, 1)}))


def walked(side: str, path: Path, rows: int, what: str) -> float:
    command = [sys.executable, "-W", "ignore", __file__, "--child", side, str(path), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])[what])


@functools.cache
def _reader() -> Any:
    """img2dataset's module alone: the package would import torch, Ray and more, which the reader has no use for."""
    package = importlib.util.find_spec("img2dataset")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0], "reader.py")
    spec = importlib.util.spec_from_file_location("img2dataset_reader", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _piece(first: int, rows: int) -> pa.Table:
    rng = np.random.default_rng(first)
    host, image, caption = (pa.array(rng.integers(0, most, rows)).cast(pa.string()) for most in (10**4, 10**9, 10**6))
    return pa.table(
        {
            "url": pc.binary_join_element_wise("http://h", host, ".example/", image, ".jpg", ""),  # type: ignore
            "caption": pc.binary_join_element_wise("a picture of ", caption, ""),  # type: ignore
        }
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "PATH", "ROWS"))
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]), int(arguments.child[2]))
        sys.exit()
    many, fewer, runs = (300_000, 100_000, 1) if arguments.quick else (10_000_000, 1_000_000, 3)
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("large.parquet", many), ("list.csv.gz", fewer)):
            path = Path(folder, name)
            make(path, rows)
            case = f"{rows:,} rows, {name.partition('.')[2]}"

            def mine(what: str, path: Path = path, rows: int = rows) -> float:
                return walked("ours", path, rows, what)

            measure("url_list", f"memory, {case}", "bytes", lambda mine=mine: mine("bytes"), 2.0**31, 1.0, runs=1)
            measure(
                "url_list", f"time, {case}", "s", lambda mine=mine: mine("s"), rows / BUDGET_ROWS_PER_S, 1.0, runs=1
            )
        make(Path(folder, "list.parquet"), fewer)
        for name in ("list.parquet", "list.csv.gz"):
            for what, unit in (("more_bytes", "bytes"), ("s", "s")):

                def of(side: str, path: Path = Path(folder, name), what: str = what) -> float:
                    return walked(side, path, fewer, what)

                case = (
                    f"{'memory' if unit == 'bytes' else 'time'}, {fewer:,} rows, {name.partition('.')[2]}, img2dataset"
                )
                measure("url_list", case, unit, lambda of=of: of("ours"), lambda of=of: of("peer"), 1.0, runs=runs)
