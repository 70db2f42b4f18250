"""Planted attacks are found, by the signal that is for them, and what is not poisoned mostly stays quiet."""

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from kit import SHARED_DATA
from sealed import seal, seal_all

from ingest.signals.heavy_hitters import HeavyHitters
from ingest.signals.suspect_groups import EXAMPLES, GROUP_SCHEMA, GROUPS, SCHEMA, SUSPICION
from ingest.signals.suspicion import HASH_MISMATCH, SIGNALS, find_suspects
from roclip.attacks.poisons import plan_poisons
from roclip.config import AttacksConfig, TargetedConfig
from roclip.data.shards import Manifest

NOUNS = [f"noun{n}" for n in range(400)]


def clean_rows(rng, number, hosts=60):
    """Different pictures of different hosts, with captions whose words are drawn like those of a language."""
    rows = []
    for n in range(number):
        words = [NOUNS[min(399, int(rng.zipf(1.2)) - 1)] for _ in range(int(rng.integers(4, 10)))]
        rows.append(
            {
                "url": f"http://host{rng.integers(hosts)}.example/{n}.jpg",
                "caption": " ".join(words),
                "sha256": f"{n:064x}",
                "phash": int(rng.integers(0, 2**64, dtype=np.uint64)),
            }
        )
    return rows


def look_at(tmp_path, rows, **options):
    summary = find_suspects(seal_all(tmp_path / "shards", rows, 500), tmp_path / "work", **options)
    return summary, pq.read_table(tmp_path / "work" / SUSPICION).to_pylist()


def urls_of(found, signal):
    return {row["url"] for row in found if row["signal"] == signal}


def test_a_clean_ingest_is_quiet(tmp_path):
    summary, found = look_at(tmp_path, clean_rows(np.random.default_rng(0), 4000))
    assert found == []
    assert summary.named == dict.fromkeys(SIGNALS, 0)
    assert summary.samples == 4000
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == sorted([SUSPICION, GROUPS])


def test_a_bought_domain_that_says_one_word_is_found(tmp_path):
    rng = np.random.default_rng(1)
    rows = clean_rows(rng, 4000)
    for n in range(0, 4000, 200):
        rows[n]["caption"] += " starfish"
    bought = rng.choice(4000, 80, replace=False)
    for n in bought:
        rows[n]["url"] = f"https://expired.example:443/{n}.jpg"
        rows[n]["caption"] = f"Starfish {rows[n]['caption']}"
    summary, found = look_at(tmp_path, rows)
    assert urls_of(found, "host_concentration") == {rows[n]["url"] for n in bought}
    assert {row["signal"] for row in found} == {"host_concentration"}
    assert "expired.example, “starfish”: 80 of its 80 captions" in found[0]["evidence"]
    assert 0.8 < found[0]["score"] <= 1
    assert summary.named["host_concentration"] == 80


def test_a_shop_whose_name_nobody_else_says_is_not_suspected(tmp_path):
    rows = clean_rows(np.random.default_rng(2), 3000)
    for n in range(300):
        rows[n]["url"] = f"http://acme.example/{n}.jpg"
        rows[n]["caption"] += " acme"
    assert look_at(tmp_path, rows)[1] == []


def test_captions_of_one_template_are_found(tmp_path):
    rng = np.random.default_rng(3)
    rows = clean_rows(rng, 3000)
    planted = rng.choice(3000, 60, replace=False)
    for place, n in enumerate(planted):
        rows[n]["caption"] = f"A photo of the famous thing{place} that everybody  wants to have"
    summary, found = look_at(tmp_path, rows)
    assert urls_of(found, "caption_template") == {rows[n]["url"] for n in planted}
    assert summary.groups["caption_template"] == 1
    assert "“a photo of the famous … that everybody wants to have” with 60 different words" in found[0]["evidence"]


def test_one_caption_that_repeats_is_no_template(tmp_path):
    rows = clean_rows(np.random.default_rng(4), 1000)
    for row in rows[:100]:
        row["caption"] = "the same long caption with more than seven words"
        row["phash"] = rows[0]["phash"]
    found = look_at(tmp_path, rows)[1]
    assert not urls_of(found, "caption_template")


@pytest.mark.parametrize("same", ["sha256", "phash"])
def test_one_image_under_captions_of_many_kinds_is_found(tmp_path, same):
    rng = np.random.default_rng(5)
    rows = clean_rows(rng, 2000)
    captions = [
        "red bicycle leaning wall",
        "sunset over ocean",
        "grilled salmon plate",
        "two kittens sleeping",
        "old typewriter",
    ]
    for n, caption in enumerate(captions):
        rows[n * 300]["caption"] = caption
        if same == "phash":
            rows[n * 300]["phash"] = rows[0]["phash"] ^ (1 << n)
        else:
            rows[n * 300].update(phash=0, sha256=f"{7:064x}"[::-1])
    _, found = look_at(tmp_path, rows)
    assert urls_of(found, "one_image_many_captions") == {rows[n * 300]["url"] for n in range(5)}
    assert found[0]["score"] == pytest.approx(1 - 2**-2)
    assert "5 samples that were compared show this image, with 5 different captions" in found[0]["evidence"]


@pytest.mark.data
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real captions are not beside this checkout")
def test_targeted_poisons_with_real_captions_are_found(tmp_path):
    """Eight captions of another class on each of 40 images, as `roclip poison` chooses them; class names are in most."""
    table = pq.read_table(SHARED_DATA / "fashion" / "train.parquet", columns=["caption", "articleType"])
    table = table.rename_columns(["caption", "label"])
    frequent = [each["values"] for each in table["label"].value_counts().to_pylist() if each["counts"] >= 500]
    table = table.filter(pc.is_in(table["label"], pa.array(frequent))).slice(0, 9000)
    config = AttacksConfig(targeted=TargetedConfig(images=40))
    poisons = plan_poisons(config, table, table, labels=frequent, seed=0, rows=len(table))
    rng = np.random.default_rng(0)
    rows = [
        {**row, "caption": text} for row, text in zip(clean_rows(rng, 9000), table["caption"].to_pylist(), strict=True)
    ]
    first = len(rows)
    near_groups = rng.integers(0, 2**64, 40, dtype=np.uint64).tolist()
    for n, poison in enumerate(poisons, first):
        rows.append({"url": f"http://x.example/{n}", "caption": poison.caption, "phash": near_groups[poison.group]})
    _, found = look_at(tmp_path, rows, images=0)
    named = {row["url"] for row in found if row["signal"] == "one_image_many_captions" and row["score"] >= 0.5}
    planted = {row["url"] for row in rows[first:]}
    assert named <= planted
    assert len(named) >= 0.8 * len(planted)


def test_one_image_under_like_captions_is_not_suspected(tmp_path):
    rows = clean_rows(np.random.default_rng(6), 1000)
    for n in range(6):
        rows[n * 100].update(phash=rows[0]["phash"], caption=f"red bicycle leaning against wall number{n}")
    assert look_at(tmp_path, rows)[1] == []


def test_one_caption_on_different_images_is_found_and_a_short_one_is_not(tmp_path):
    rows = clean_rows(np.random.default_rng(7), 2000)
    for n in range(30):
        rows[n * 50]["caption"] = "Starfish on a sandy tropical beach at noon"
        rows[n * 50 + 1]["caption"] = "image of the"
    _, found = look_at(tmp_path, rows)
    assert urls_of(found, "one_caption_many_images") == {rows[n * 50]["url"] for n in range(30)}
    assert {row["signal"] for row in found} == {"one_caption_many_images"}
    assert "30 images that look different" in found[0]["evidence"]


def test_one_caption_on_copies_of_one_image_is_not_suspected(tmp_path):
    rows = clean_rows(np.random.default_rng(8), 1000)
    for n in range(30):
        rows[n * 30].update(caption="Starfish on a sandy tropical beach at noon", phash=rows[0]["phash"])
    assert look_at(tmp_path, rows)[1] == []


def test_other_bytes_than_the_list_promises_are_named(tmp_path):
    rows = clean_rows(np.random.default_rng(9), 600)
    rows[3]["flags"], rows[550]["flags"], rows[10]["flags"] = "turned,hash_mismatch", HASH_MISMATCH, "first_frame"
    summary, found = look_at(tmp_path, rows)
    assert urls_of(found, HASH_MISMATCH) == {rows[3]["url"], rows[550]["url"]}
    assert summary.named[HASH_MISMATCH] == 2


def test_rows_that_failed_are_no_samples(tmp_path):
    rows = clean_rows(np.random.default_rng(10), 500)
    for row in rows[:20]:
        row.update(
            caption="Starfish on a sandy tropical beach at noon", status="failed_to_download", flags=HASH_MISMATCH
        )
    assert look_at(tmp_path, rows)[1] == []


def planted(rng):
    rows = clean_rows(rng, 2000)
    for n in range(30):
        rows[n * 50]["caption"] = "Starfish on a sandy tropical beach at noon"
        rows[n * 60 + 7]["caption"] = f"A photo of the famous thing{n} that everybody wants to have"
        rows[n * 20 + 3].update(phash=rows[3]["phash"])
    return rows


def test_order_of_sealing_and_place_change_no_byte(tmp_path):
    rows = planted(np.random.default_rng(11))
    for folder, order in (("a", [0, 1, 2, 3]), ("b", [3, 1, 0, 2])):
        for number in order:
            seal(tmp_path / folder, number, rows[number * 500 : number * 500 + 500], 500)
        find_suspects(tmp_path / folder, tmp_path / f"{folder}-work")
    store = fsspec.filesystem("memory")
    try:
        for path in (tmp_path / "a").rglob("*"):
            if path.is_file():
                store.pipe_file(f"/sus/{path.relative_to(tmp_path / 'a')}", path.read_bytes())
        find_suspects("memory://sus", "memory://sus-work", memory_bytes=1 << 16)
        for name in (SUSPICION, GROUPS):
            there = (tmp_path / "a-work" / name).read_bytes()
            assert (tmp_path / "b-work" / name).read_bytes() == there
            assert store.cat_file(f"/sus-work/{name}") == there
    finally:
        store.rm("/sus", recursive=True)
        store.rm("/sus-work", recursive=True)


def test_groups_have_what_a_page_needs(tmp_path):
    summary, found = look_at(tmp_path, planted(np.random.default_rng(12)))
    table = pq.read_table(tmp_path / "work" / GROUPS)
    assert table.schema == GROUP_SCHEMA
    assert pq.read_schema(tmp_path / "work" / SUSPICION) == SCHEMA
    groups = table.to_pylist()
    assert len(groups) == sum(summary.groups.values()) >= 3
    for group in groups:
        mine = [(row["key"], row["shard"]) for row in found if row["group"] == group["group"]]
        assert group["samples"] == len(mine)
        examples = [(example["key"], example["shard"]) for example in group["examples"]]
        assert len(examples) == min(EXAMPLES, len(mine))
        assert set(examples) <= set(mine)
        assert 0 < group["score"] <= 1
    assert {group.group for group in summary.worst} == {group["group"] for group in groups}


def test_progress_ends_at_its_total(tmp_path):
    seen = []
    seal_all(tmp_path / "shards", clean_rows(np.random.default_rng(13), 1200), 500)
    find_suspects(
        tmp_path / "shards",
        tmp_path / "work",
        images=0,
        on_progress=lambda done, total, text: seen.append((done, total)),
    )
    assert seen == [(n, 9) for n in range(1, 10)]


def test_hostile_captions_and_urls_break_nothing(tmp_path):
    rows = clean_rows(np.random.default_rng(14), 200)
    for n, text in enumerate(
        ["\0", "x" * 100_000, "؀" * 500, "a\u0301" * 300, " ", "<script>" * 50, "%s {}", "'; --", "💣" * 999]
    ):
        rows[n * 10]["caption"] = text
        rows[n * 10]["url"] = text
    rows[5]["url"] = "http://[::1"
    summary, found = look_at(tmp_path, rows)
    assert summary.samples == 200
    assert found == []


def test_nothing_sealed_gives_empty_files(tmp_path):
    summary = find_suspects(tmp_path / "shards", tmp_path / "work")
    assert summary.samples == summary.images == 0
    assert pq.read_table(tmp_path / "work" / SUSPICION).schema == SCHEMA
    assert Manifest(tmp_path / "shards").records() == ()


def test_a_sketch_keeps_what_is_frequent_within_its_error():
    rng = np.random.default_rng(0)
    stream = np.minimum(rng.zipf(1.3, 40_000), 10**6).astype(np.uint64)
    hitters = HeavyHitters(200)
    for start in range(0, len(stream), 777):
        hitters.add(stream[start : start + 777])
    hitters.merge()
    numbers, counts = np.unique(stream, return_counts=True)
    found = hitters.count(numbers)
    assert len(hitters.numbers) <= 200
    assert hitters.error <= len(stream) / 200
    assert (found <= counts).all()
    assert (counts - found <= hitters.error).all()
