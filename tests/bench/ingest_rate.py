"""Images a second from a list of URLs to sealed shards: `roclip ingest` with every protection on, against img2dataset.

Both fetch the same list from the same origin with the same settings (32 threads in each of two processes, shards of 1,000,
256 px, JPEG quality 95, a timeout of 10 s, no retries), as commands of their own, from their start until the last shard can be
trained on; what our command does after that (duplicates, suspicion, its page) is told in a line of its own. The origin is a
process on loopback that plays 200 hosts (`tests/support/web.py`). Two lists: all well, and with 5 % of the URLs on dead hosts,
2 % that drip and 1 % of 256 MiB. A dripping answer ends by itself after 60 s; without that img2dataset would never end.

    python tests/bench/ingest_rate.py [--quick] [--urls 10000] [--runs 3] [--growth FILE.svg [--most 1000000]] [--images PARQUET]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import measure

HOME = Path(__file__).parents[2]
sys.path.insert(0, str(HOME / "tests" / "support"))
from web import FAULTS, HOSTS, PHOTOS, Web, url_list  # noqa: E402

PROCESSES, THREADS, PER_SHARD = 2, 32, 1000
PRESET = """
name: bench
data: {{urls: {urls}, max_bad_frac: 1.0}}
ingest:
  samples_per_shard: {per_shard}
  image_size: 256
  threads: {threads}
  timeout_s: 10
  retries: 0
  retry_passes: 0
  max_in_flight: 4
  policy: {{allow_networks: [127.0.0.0/8], contact: bench@localhost, deadline_s: 10}}
cluster: {{cpus_per_ingest_task: 0.5}}
"""


def ours(urls: Path, folder: Path, number: int) -> float:
    """Images a second."""
    preset = folder / "preset.yaml"
    preset.write_text(PRESET.format(urls=urls, per_shard=min(PER_SHARD, number), threads=THREADS))
    began_s = time.time()
    seconds = _timed([sys.executable, "-m", "cluster.cli", "ingest", str(preset), f"run_dir={folder / 'run'}"])
    end = folder / "run" / "shards" / "manifest" / "END.json"
    samples, sealed_s = json.loads(end.read_text())["succeeded"], end.stat().st_mtime - began_s
    after = {
        "samples": samples,
        "sealed_after_s": round(sealed_s, 1),
        "signals_and_page_s": round(seconds - sealed_s, 1),
    }
    print(json.dumps({"bench": "ingest", "ours": after}), flush=True)
    return samples / sealed_s


def peer(urls: Path, folder: Path, number: int) -> float:
    """Images a second."""
    options = {
        "url_list": str(urls),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": str(folder / "out"),
        "output_format": "webdataset",
        "processes_count": PROCESSES,
        "thread_count": THREADS,
        "number_sample_per_shard": min(PER_SHARD, number),
        "image_size": 256,
        "timeout": 10,
        "distributor": "multiprocessing",
    }
    code = f"from img2dataset import download\nif __name__ == '__main__':\n    download(**{options!r})\n"
    (folder / "peer.py").write_text(code)
    seconds = _timed([sys.executable, str(folder / "peer.py")])
    stats = [json.loads(path.read_text()) for path in (folder / "out").glob("*_stats.json")]
    return sum(stat["successes"] for stat in stats) / seconds


def _timed(command: list[str]) -> float:
    environment = {**os.environ, "PYTHONPATH": str(HOME), "NO_ALBUMENTATIONS_UPDATE": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HOME)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - start


def in_new_folder(side, urls: Path, number: int) -> float:
    folder = Path(tempfile.mkdtemp())
    try:
        return side(urls, folder, number)
    finally:
        shutil.rmtree(folder)


def grow(path: Path, images: Path, most: int) -> None:
    """Images a second until the last shard, from 1,000 to `most` URLs."""
    from matplotlib.figure import Figure

    sizes = [size for size in (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000) if size <= most]
    rates = []
    with Web(images, HOSTS) as web, tempfile.TemporaryDirectory() as folder:
        for number in sizes:
            urls = url_list(Path(folder) / f"{number}.parquet", web, number, {})
            rates.append(in_new_folder(ours, urls, number))
            print(json.dumps({"bench": "ingest", "urls": number, "images_per_s": round(rates[-1], 1)}), flush=True)
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(sizes, rates, marker="o", color="#1f6f8b")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("URLs in the list")
    axes.set_ylabel("images/s until the last shard")
    axes.grid(color="#e6e6e6")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 URLs, one run")
    parser.add_argument("--urls", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3, help="of the list that is all well; one of the other")
    parser.add_argument("--images", type=Path, default=PHOTOS, help="parquet with a column `image`")
    parser.add_argument("--growth", type=Path, metavar="FILE.svg")
    parser.add_argument("--most", type=int, default=1_000_000)
    arguments = parser.parse_args()
    if arguments.growth:
        grow(arguments.growth, arguments.images, arguments.most)
        sys.exit()
    number, runs = (1_000, 1) if arguments.quick else (arguments.urls, arguments.runs)
    with Web(arguments.images, HOSTS) as web, tempfile.TemporaryDirectory() as folder:
        for case, faults, bar in (("all well", {}, 1.0), ("5 % dead, 2 % dripping, 1 % huge", FAULTS, 3.0)):
            urls = url_list(Path(folder) / "urls.parquet", web, number, faults)
            measure(
                "ingest",
                f"{number:,} URLs, {case}",
                "images/s",
                lambda urls=urls: in_new_folder(ours, urls, number),
                lambda urls=urls: in_new_folder(peer, urls, number),
                bar,
                runs=runs if not faults else 1,
                lower_is_better=False,
            )
