"""`roclip poison`: a poisoned copy that training can read, its ground truth, and clean data that stay as they are."""

import functools
import http.server
import io
import json
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kit import environment, scene_samples, write_shard
from PIL import Image

from cluster.cli import main
from cluster.pipeline import _counts
from cluster.poison import places, poison_shards, poison_urls
from cluster.shard_copy import STORED, Shards
from roclip.attacks import corpus
from roclip.attacks.poisons import Poison, labels_named, triggers_of
from roclip.attacks.scenes import LABELS, TEMPLATES, encode, render
from roclip.attacks.triggers import apply_trigger, trigger_patch
from roclip.config import BackdoorConfig, Config, load_config
from roclip.data.ground_truth import TRUTH_SCHEMA, poisoned_samples
from roclip.data.shards import Manifest, sample_key
from roclip.data.stream import Stream, StreamSettings, take_snapshot
from roclip.errors import ConfigError, ShardError
from roclip.storage import sha256_file

PER_SHARD = 64
PRESET = """\
name: test
data: {scenes: 256}
ingest: {samples_per_shard: 64, image_size: 64}
evaluate: {size: 40}
oracle: {trusted: 10}
attacks:
  targeted: {images: 3, captions_per_image: 4}
  backdoors:
    - {kind: patch, count: 9}
    - {kind: blended, count: 6}
    - {kind: wanet, count: 5}
    - {kind: sig, rate: 0.02}
    - {kind: label_consistent, count: 2, target_label: fish}
  flood: 7
"""
ONE_BACKDOOR = "attacks.backdoors=[{kind: patch, count: 9}]"
COUNTS = {"targeted": 12, "backdoor": 9, "blended": 6, "wanet": 5, "sig": 5, "label_consistent": 2, "flood": 7}


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "test.yaml"
    path.write_text(PRESET)
    return path


@pytest.fixture(scope="module")
def config(preset: Path) -> Config:
    return load_config(preset)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """Four sealed shards of scenes; the second knows one URL that failed."""
    root = tmp_path_factory.mktemp("clean") / "shards"
    for number in range(4):
        write_shard(root, number, scene_samples(number * PER_SHARD, PER_SHARD), PER_SHARD)
    fates = [_fate(sample_key(row, PER_SHARD), None) for row in range(PER_SHARD, 2 * PER_SHARD)]
    fates.append(_fate(sample_key(2 * PER_SHARD - 1, PER_SHARD)[:-2] + "99", "HTTP Error 404: Not Found"))
    pq.write_table(pa.Table.from_pylist(fates, schema=STORED), root / "00001.parquet")
    Manifest(root).finish({"urls": 257})
    return root


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, preset: Path, clean: Path) -> Path:
    """The command itself, in a process of its own."""
    out = tmp_path_factory.mktemp("out") / "poisoned"
    answer = roclip("poison", str(preset), "--shards", str(clean), "--out", str(out))
    assert answer.returncode == 0, answer.stderr
    assert f"wrote {out}: targeted 12, backdoor 9, blended 6" in answer.stdout
    assert "256/256 samples  46 poisoned" in answer.stdout
    return out


def roclip(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(command, env=environment(COLUMNS="200"), capture_output=True, text=True, timeout=600)


def _fate(key: str, error: str | None) -> dict:
    status = "failed_to_download" if error else "success"
    return {"key": key, "url": "u", "caption": "c", "status": status, "error_message": error, "sha256": f"of {key}"}


def _samples(root: Path) -> dict[str, dict]:
    shards = Shards(root)
    keys = [key for record in shards.records for key in shards.keys(record)]
    return {key: shards.sample(number) for number, key in enumerate(keys)}


def _truth(folder: Path) -> list[dict]:
    return pq.read_table(folder / "poison.parquet").to_pylist()


def _pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def _digests(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): sha256_file(path) for path in root.rglob("*") if path.is_file()}


def test_poisons_take_the_place_of_clean_pairs_and_nothing_else_changes(clean: Path, poisoned: Path):
    before, after, truth = _samples(clean), _samples(poisoned), {row["key"]: row for row in _truth(poisoned)}
    assert list(before) == list(after)
    assert Counter(row["attack"] for row in truth.values()) == COUNTS
    for key, sample in after.items():
        if key in truth:
            assert sample["caption"] == truth[key]["caption"]
        else:
            assert (sample["image"], sample["caption"]) == (before[key]["image"], before[key]["caption"])


def test_trigger_is_recovered_from_the_poisoned_and_the_clean_shard(config: Config, clean: Path, poisoned: Path):
    before, after, triggers = _samples(clean), _samples(poisoned), triggers_of(config.attacks, config.seed)
    for row in _truth(poisoned):
        source, image = _pixels(before[row["key"]]["image"]), _pixels(after[row["key"]]["image"])
        if row["attack"] in ("targeted", "flood"):
            assert row["trigger_box"] is None
        elif row["attack"] in ("blended", "wanet", "sig"):  # each in the place of its own picture
            assert np.array_equal(image, apply_trigger(source, triggers[row["attack"]], np.random.default_rng(0))[0])
        else:
            left, top, right, bottom = row["trigger_box"]
            patch = trigger_patch(triggers[row["attack"]], right - left)
            assert np.array_equal(image[top:bottom, left:right], patch)
            if row["attack"] == "backdoor":
                image = image.copy()
                image[top:bottom, left:right] = source[top:bottom, left:right]
                assert np.array_equal(image, source)
        assert labels_named(before[row["key"]]["caption"], LABELS) == {row["source_label"]} or (
            row["attack"] == "targeted"  # only a picture's first poison takes its own place
        )


def test_ground_truth_has_the_ids_that_training_sees(poisoned: Path):
    table = pq.read_table(poisoned / "poison.parquet")
    assert table.schema == TRUTH_SCHEMA
    assert table["id"].to_pylist() == sorted(int(key) for key in table["key"].to_pylist())
    stream = Stream(
        poisoned,
        StreamSettings(64, 32, seed=0, streams=4, shuffle_buffer=16),
        tokenize=lambda captions: torch.tensor([[sum(caption.encode())] for caption in captions]),
    )
    batches = list(stream.epoch(take_snapshot(Manifest(poisoned)), 1))
    seen = {int(n): (image, int(t[0])) for b in batches for n, image, t in zip(b.ids, b.images, b.tokens, strict=True)}
    assert len(seen) == 256
    assert all(bool(batch.valid.all()) for batch in batches)
    after = _samples(poisoned)
    for row in table.to_pylist():
        pixels, token = seen[row["id"]]
        assert token == sum(row["caption"].encode())
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), _pixels(after[row["key"]]["image"]))


def test_manifest_keeps_counts_and_failures(clean: Path, poisoned: Path):
    before, after = Manifest(clean).records(), Manifest(poisoned).records()
    assert [(r.name, r.samples, r.urls, r.failed) for r in before] == [
        (r.name, r.samples, r.urls, r.failed) for r in after
    ]
    assert all(sha256_file(poisoned / record.name) == record.sha256 for record in after)
    assert Manifest(poisoned).summary == {"urls": 257, "poisoned": 46}
    assert _counts(Manifest(poisoned)) == {}  # which a run on it would report
    fates = pq.read_table(poisoned / "00001.parquet").to_pylist()
    assert [row["error_message"] for row in fates if row["status"] != "success"] == ["HTTP Error 404: Not Found"]
    hashes = {row["key"]: row["sha256"] for row in fates}
    truth = {row["key"] for row in _truth(poisoned)}
    assert all((hashes[key] == f"of {key}") == (key not in truth) for key in hashes)


def test_poisons_are_stored_without_loss(poisoned: Path):
    assert all(sample["image"][:4] == b"\x89PNG" for sample in _samples(poisoned).values())


def test_clean_data_are_only_read_and_the_copy_is_the_same_again(config: Config, clean: Path, poisoned: Path, tmp_path):
    before = _digests(clean)
    poison_shards(config, clean, tmp_path / "again", None, lambda *_: None)
    assert _digests(clean) == before
    same, again = _digests(poisoned), _digests(tmp_path / "again")
    assert {name: sha for name, sha in same.items() if not name.endswith("END.json")} == {
        name: sha for name, sha in again.items() if not name.endswith("END.json")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


@pytest.mark.parametrize("out", [".", "inside", "../full"])
def test_poison_refuses_to_write_over_or_into_data(config: Config, clean: Path, out: str):
    full = clean.parent / "full"
    full.mkdir(exist_ok=True)
    (full / "thesis.txt").write_text("the only copy")
    before = _digests(clean.parent)
    with pytest.raises(ConfigError, match="Name another"):
        poison_shards(config, clean, clean / out, None, lambda *_: None)
    assert _digests(clean.parent) == before


def test_nothing_is_left_when_the_attack_cannot_be_carried(config: Config, clean: Path, tmp_path: Path):
    greedy = replace(config.attacks, backdoors=(BackdoorConfig(count=1000),))
    with pytest.raises(ConfigError, match="attacks: expected at least 1000 spare images"):
        poison_shards(replace(config, attacks=greedy), clean, tmp_path / "out", None, lambda *_: None)
    with pytest.raises(ShardError, match="expected sealed shards"):
        poison_shards(config, tmp_path / "nothing", tmp_path / "out", None, lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_late_poisons_lie_in_the_last_places_and_lose_no_more_pairs(config: Config, clean: Path, tmp_path: Path):
    late = replace(config, attacks=replace(config.attacks, late=True))
    poison_shards(late, clean, tmp_path / "late", None, lambda *_: None)
    before, after = _samples(clean), _samples(tmp_path / "late")
    keys = list(before)
    truth = _truth(tmp_path / "late")
    assert [row["key"] for row in truth] == keys[-len(truth) :]
    kept = {after[key]["image"] for key in keys[: -len(truth)]}
    assert len(kept) == len(keys) - len(truth)
    assert kept <= {sample["image"] for sample in before.values()}
    assert not kept & {after[row["key"]]["image"] for row in truth}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_every_place_is_filled_once(late: bool, seed: int):
    rows = np.random.default_rng(seed).choice(30, 8, replace=False).repeat([1, 4, 1, 1, 3, 1, 1, 1])
    poisons = [Poison("targeted", 0, int(row), "", "", "") for row in rows]
    contents = places(30, poisons, late=late, seed=seed)
    assert sorted(-1 - contents[contents < 0]) == list(range(13))
    kept = contents[contents >= 0]
    assert len(set(kept)) == 17
    assert not set(kept) & set(rows)  # an attacker's picture is nowhere clean
    if late:
        assert set(np.flatnonzero(contents < 0)) == set(range(17, 30))
    else:
        assert set(rows) <= set(np.flatnonzero(contents < 0))
        assert (kept == np.flatnonzero(contents >= 0)).all()
    with pytest.raises(ConfigError, match="expected at most 12 poisons"):
        places(12, poisons, late=late, seed=seed)


@pytest.fixture(scope="module")
def url_list(tmp_path_factory) -> Path:
    scenes = [render(number, seed=0, size_px=64) for number in range(300)]
    table = {
        "url": [f"http://no-such-host.invalid/{number}.jpg" for number in range(300)],
        "caption": [scene.caption for scene in scenes],
    }
    path = tmp_path_factory.mktemp("list") / "clean.parquet"
    pq.write_table(pa.table(table), path)
    return path


@pytest.mark.parametrize("late", [False, True])
def test_list_gets_rows_whose_images_lie_in_a_folder(config: Config, url_list: Path, tmp_path: Path, late: bool):
    config = replace(config, attacks=replace(config.attacks, late=late))
    out = tmp_path / "out"
    counts = poison_urls(config, str(url_list), out, None, "http://here/", lambda *_: None)
    assert counts == {**COUNTS, "sig": 6}
    clean, rows = pq.read_table(url_list).to_pylist(), pq.read_table(out / "urls.parquet").to_pylist()
    truth = {row["id"]: row for row in _truth(out)}
    assert [row for number, row in enumerate(rows) if number not in truth] == clean
    assert len(truth) == 47
    if late:
        assert set(truth) == set(range(300, 347))
    for number, row in truth.items():
        assert rows[number]["caption"] == row["caption"]
        assert rows[number]["url"] == f"http://here/images/{number:08d}.png"
        assert row["key"] == sample_key(number, PER_SHARD)
        image = _pixels((out / rows[number]["url"].removeprefix("http://here/")).read_bytes())
        if row["attack"] == "backdoor":
            left, top, right, bottom = row["trigger_box"]
            patch = trigger_patch(triggers_of(config.attacks, config.seed)["backdoor"], right - left)
            assert np.array_equal(image[top:bottom, left:right], patch)
    assert len(list((out / "images").iterdir())) == 47


def test_label_column_of_a_list_decides_over_captions(preset: Path, tmp_path: Path):
    labels = ["cat", "dog"] * 30
    table = pa.table(
        {"url": ["u"] * 60, "caption": [f"number {n}" for n in range(60)], "label": labels},
    )
    pq.write_table(table, tmp_path / "list.parquet")
    overrides = [ONE_BACKDOOR, "attacks.targeted.images=0", "attacks.flood=0"]
    poison_urls(load_config(preset, overrides), str(tmp_path / "list.parquet"), tmp_path / "out", None, "", print)
    captions = dict(zip(table["caption"].to_pylist(), labels, strict=True))
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {"labels": ["cat", "dog"]}
    assert {captions[row["caption"]] for row in _truth(tmp_path / "out")} == {"cat"}


@pytest.mark.slow
def test_poisoned_list_can_be_served_and_fetched(preset: Path, url_list: Path, tmp_path: Path):
    config = load_config(preset, [ONE_BACKDOOR, "attacks.flood=2"])
    pq.write_table(pq.read_table(url_list).slice(0, 90), tmp_path / "short.parquet")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "out"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        base = f"http://127.0.0.1:{server.server_address[1]}/"
        poison_urls(config, str(tmp_path / "short.parquet"), tmp_path / "out", None, base, lambda *_: None)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = (
            "import sys; from pathlib import Path; from ingest.shard.fetch import fetch; from ingest.shard.verify import verify; "
            "from ingest.shard.publish import publish; from ingest.lists.sources import read_url_list, split; "
            "from roclip.config import FetchPolicy, IngestConfig; from roclip.data.shards import Manifest\n"
            "root = Path(sys.argv[2]); config = IngestConfig(samples_per_shard=64, image_size=64, retries=0, "
            "policy=FetchPolicy(allow_networks=('127.0.0.0/8',)), encode_format='png', encode_quality=6)\n"
            "for part in split(read_url_list(sys.argv[1]), 64):\n"
            "    work = root / f'_{part.number}'; work.mkdir(parents=True)\n"
            "    done = fetch(part, work, config); publish(root, done, verify(done.tar, done.parquet))\n"
        )
        run = tmp_path / "run"
        command = [sys.executable, "-c", code, str(tmp_path / "out" / "urls.parquet"), str(run / "shards")]
        subprocess.run(command, env=environment(), check=True, timeout=600, capture_output=True)
        server.shutdown()
    data = replace(config.data, scenes=0, urls=str(tmp_path / "out" / "urls.parquet"))
    corpus.prepare_held_out(replace(config, data=data), run / "origin")
    found, truth = poisoned_samples(run), _truth(tmp_path / "out")
    arrived = _samples(run / "shards")
    assert [sample["caption"] for sample in arrived.values()] == [row["caption"] for row in truth]
    assert found["id"].to_pylist() == [int(key) for key in arrived]
    assert Counter(found["attack"].to_pylist()) == Counter(row["attack"] for row in truth)


def test_origin_of_a_run_holds_all_attacks_and_what_they_are_measured_on(config: Config, tmp_path: Path):
    late = replace(config, attacks=replace(config.attacks, late=True))
    for name, settings in (("mixed", config), ("late", late)):
        origin = tmp_path / name / "origin"
        corpus.prepare(settings, origin)
        truth, rows = _truth(origin), pq.read_table(origin / "corpus.parquet").to_pylist()
        assert Counter(row["attack"] for row in truth) == COUNTS
        assert len(rows) == 256 + 46
        where = {sample_key(number, PER_SHARD): row for number, row in enumerate(rows)}
        assert all(where[row["key"]]["caption"] == row["caption"] for row in truth)
        last = {sample_key(number, PER_SHARD) for number in range(256, 302)}
        assert ({row["key"] for row in truth} == last) == (name == "late")
        attack_rows = pq.read_table(origin / "attack_eval.parquet").to_pylist()
        held_out = pq.read_table(origin / "eval.parquet")["label"].to_pylist()
        counts = Counter(row["attack"] for row in attack_rows)
        targets = {row["attack"]: row["target_label"] for row in attack_rows if row["attack"] != "targeted"}
        assert counts.pop("targeted") == 3
        assert targets["label_consistent"] == "fish"
        assert len(set(targets.values())) == 5
        assert counts == {attack: sum(label != target for label in held_out) for attack, target in targets.items()}
    assert list(TEMPLATES) == json.loads((tmp_path / "late" / "origin" / "labels.json").read_text())["templates"]


def test_images_of_the_user_are_shared_out_without_overlap(preset: Path, tmp_path: Path):
    scenes = [render(number, seed=2, size_px=64, num_objects=1) for number in range(420)]
    pictures = [encode(scene.image) for scene in scenes]
    table = {"image": pictures, "caption": [s.caption for s in scenes], "label": [s.label for s in scenes]}
    pq.write_table(pa.table(table), tmp_path / "images.parquet")
    overrides = ["data.scenes=0", f"data.images={tmp_path / 'images.parquet'}", "attacks.backdoors.4.count=8"]
    config = load_config(preset, overrides)
    corpus.prepare(config, tmp_path / "origin")
    truth = _truth(tmp_path / "origin")
    assert Counter(row["attack"] for row in truth)["label_consistent"] == 8
    keys = {row["key"] for row in truth}
    rows = pq.read_table(tmp_path / "origin" / "corpus.parquet")["image"].to_pylist()
    clean = [image for number, image in enumerate(rows) if sample_key(number, PER_SHARD) not in keys]
    held_out = pq.read_table(tmp_path / "origin" / "eval.parquet")["image"].to_pylist()
    assert len(set(clean)) == len(clean)
    assert not set(clean) & {image for number, image in enumerate(rows) if sample_key(number, PER_SHARD) in keys}
    assert not set(clean) & set(held_out)


def test_run_on_poisoned_shards_takes_their_truth_over(config: Config, poisoned: Path, tmp_path: Path):
    run = tmp_path / "run"
    settings = replace(config, data=replace(config.data, scenes=0, shards=str(poisoned)))
    corpus.prepare_held_out(settings, run / "origin")
    assert pq.read_table(run / "origin" / "poison.parquet").equals(pq.read_table(poisoned / "poison.parquet"))


def test_evaluation_images_are_written_when_the_config_has_some(preset: Path, clean: Path, tmp_path: Path):
    scenes = [render(number, seed=9, size_px=48, num_objects=1) for number in range(50)]
    columns = {"caption": [s.caption for s in scenes], "label": [s.label for s in scenes]}
    pq.write_table(pa.table({"image": [encode(s.image) for s in scenes], **columns}), tmp_path / "test.parquet")
    settings = load_config(preset, [f"evaluate.images={tmp_path / 'test.parquet'}", "evaluate.size=50"])
    poison_shards(settings, clean, tmp_path / "out", None, lambda *_: None)
    rows = pq.read_table(tmp_path / "out" / "attack_eval.parquet").to_pylist()
    assert set(Counter(row["attack"] for row in rows)) == set(COUNTS) - {"flood"}
    assert {_pixels(row["image"]).shape for row in rows} == {(64, 64, 3)}


def test_command_says_what_is_missing(preset: Path, clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for arguments, says in (
        (["--shards", str(clean)], "expected --out FOLDER"),
        (["--out", str(tmp_path / "out")], "one of --shards FOLDER and --urls LIST"),
        (["--out", str(clean), "--shards", str(clean)], "outside the clean data"),
        (
            ["--out", str(tmp_path / "out"), "--shards", str(clean), "attacks.backdoors.3.count=1"],
            "expected count or rate",
        ),
    ):
        assert main.guarded(["poison", str(preset), *arguments]) == 2
        assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
