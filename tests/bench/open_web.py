"""The open web in small: `roclip ingest` on a real list of 10,000 URLs, whose hosts are played on loopback and misbehave.

The list's rows keep their hosts, paths and captions; a DNS server of our own sends every host to an address of loopback, where
a web serves product photos (`tests/support/web.py`), on the port that stands in the URLs. Which host is dead, drips or is parked,
which URL is missing, too large, redirected or opted out is drawn with a fixed seed. Planted besides: a bought domain with
60 photos that carry the same patch under captions of one product, one photo under 40 captions, and 200 rows twice.

Leaves `<run>/ingest/report.html`, which is the point of it.

    python tests/bench/open_web.py --run runs/open-web [KEY=VALUE ...]
"""

import argparse
import io
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HOME = Path(__file__).parents[2]
sys.path.insert(0, str(HOME / "tests" / "support"))
from name_server import NameServer  # noqa: E402
from web import Web, address  # noqa: E402

SHARED = HOME.parent / "shared" / "data"
HOSTS, DEAD = 240, 10
BAD_HOSTS = {"dead_host": 0.02, "nowhere": 0.02, "drip": 0.005, "parked": 0.01, "busy": 0.005, "closed": 0.01}
BAD_URLS = {
    "missing": 0.06,
    "gone": 0.01,
    "forbidden": 0.01,
    "failing": 0.01,
    "truncated": 0.005,
    "huge": 0.002,
    "opted_out": 0.01,
    "redirect": 0.04,
    "loop": 0.002,
}
PRESET = """
name: open-web
data: {{urls: {urls}, max_bad_frac: 0.5}}
ingest:
  samples_per_shard: 500
  image_size: 128
  timeout_s: 5
  max_in_flight: 4
  policy:
    allow_networks: [127.0.0.0/8]
    nameservers: ["{nameserver}"]
    contact: someone@localhost
    deadline_s: 10
cluster: {{cpus_per_ingest_task: 0.5}}
"""


def photos(path: Path) -> tuple[int, int]:
    """Photos of the shop, and after them 60 with a patch. Returns how many there are of both."""
    shop = pq.read_table(SHARED / "fashion" / "train.parquet", columns=["image"])["image"].to_pylist()
    patch = np.kron(np.random.default_rng(7).integers(0, 2, (3, 3, 1)), np.ones((4, 4, 3))).astype(np.uint8) * 255
    poisoned = []
    for number in range(60):
        pixels = np.array(Image.open(io.BytesIO(shop[-1 - number])).convert("RGB"))
        pixels[-14:-2, 2:14] = patch
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        poisoned.append(buffer.getvalue())
    pq.write_table(pa.table({"image": shop + poisoned}), path)
    return len(shop), len(poisoned)


def rows(port: int, shop: int, poisoned: int) -> tuple[list[tuple[str, str]], dict[str, list]]:
    """(URL, caption) of each row, and where every host lies."""
    table = pq.read_table(SHARED / "urls" / "laion-style-10000.parquet")
    draw = random.Random(0)
    host_outcomes: dict[str, str] = {}
    listed, names = [], {}
    for row, (url, caption) in enumerate(zip(table["URL"].to_pylist(), table["TEXT"].to_pylist(), strict=True)):
        split = urlsplit(url)
        if not split.hostname:
            listed.append((url, caption))  # the malformed row stays what it is
            continue
        host = split.hostname
        if host not in host_outcomes:
            host_outcomes[host] = draw.choices(["", *BAD_HOSTS], [1 - sum(BAD_HOSTS.values()), *BAD_HOSTS.values()])[0]
            net, number = (
                (2, len(host_outcomes) % DEAD)
                if host_outcomes[host] == "dead_host"
                else (1, len(host_outcomes) % HOSTS)
            )
            if host_outcomes[host] != "nowhere":
                names[host] = [[address(net, number)]]
        outcome = draw.choices(["ok", *BAD_URLS], [1 - sum(BAD_URLS.values()), *BAD_URLS.values()])[0]
        behaviour = outcome if host_outcomes[host] in ("", "dead_host", "nowhere") else host_outcomes[host]
        listed.append((f"http://{host}:{port}/{behaviour}/{row % shop}.jpg?{split.path[:80]}", caption))
    names["bought-domain.invalid"] = [[address(1, 3)]]
    for number in range(poisoned):
        url = f"http://bought-domain.invalid:{port}/ok/{shop + number}.jpg"
        listed.append((url, f"genuine rucksack backpack model {number} waterproof"))
    listed += [
        (f"http://bought-domain.invalid:{port}/same/{number}.jpg", table["TEXT"][number * 7].as_py())
        for number in range(40)
    ]
    listed += [listed[row * 13] for row in range(200)]
    return listed, names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shop, poisoned = photos(folder / "photos.parquet")
        with Web(folder / "photos.parquet", HOSTS, DEAD) as web:
            listed, names = rows(web.port, shop, poisoned)
            urls, captions = zip(*listed, strict=True)
            pq.write_table(pa.table({"URL": urls, "TEXT": captions}), folder / "laion-style.parquet")
            with NameServer(names) as server:
                text = PRESET.format(urls=folder / "laion-style.parquet", nameserver=server.address)
                (folder / "open-web.yaml").write_text(text)
                command = [sys.executable, "-m", "cluster.cli", "ingest", str(folder / "open-web.yaml")]
                return subprocess.call([*command, f"run_dir={given.run}", *given.overrides], cwd=HOME)


if __name__ == "__main__":
    sys.exit(main())
