"""Trusted masks from every kind of source, and an oracle that is trained on them by the command."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import SHARED_DATA
from rigged import png

from roclip.attacks import scenes
from roclip.errors import ConfigError, DataError
from roclip.oracle.segmenters.base import decode_masked
from roclip.oracle.segmenters.mask_sets import PhotoColumns, read_labels, read_masks, without_background
from roclip.storage import sha256_file

NOISE = np.random.default_rng(0)


def pair(value: int) -> dict[str, bytes]:
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[:20] = value
    return {"image": png(NOISE.integers(0, 256, (40, 40, 3), dtype=np.uint8)), "mask": png(mask)}


def test_parquet_with_masks_is_read_with_the_labels_beside_it(tmp_path: Path):
    pq.write_table(pa.Table.from_pylist([pair(n % 3) for n in range(9)]), tmp_path / "masks.parquet")
    with pytest.raises(DataError, match=r"labels\.json: expected the class names"):
        read_masks(tmp_path / "masks.parquet")
    (tmp_path / "labels.json").write_text(json.dumps(["null", "ant", "bee"]))
    for source in (tmp_path / "masks.parquet", tmp_path):
        found = read_masks(source)
        assert found.labels == ("ant", "bee")
        assert found.rows == list(range(9))
        assert found.sha256 == sha256_file(tmp_path / "masks.parquet")
    few = read_masks(tmp_path, limit=4, seed=1)
    assert len(few.rows) == 4
    assert [found.images[row] for row in few.rows] == few.images
    assert read_masks(tmp_path, ("cat", "dog")).labels == ("cat", "dog")


def test_run_directory_gives_its_trusted_images(tmp_path: Path):
    (tmp_path / "origin").mkdir()
    pq.write_table(pa.Table.from_pylist([pair(1)]), tmp_path / "origin" / "trusted.parquet")
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "origin" / "eval.parquet")
    (tmp_path / "origin" / "labels.json").write_text(json.dumps({"labels": ["ant"]}))
    assert read_masks(tmp_path).labels == ("ant",)


def test_folder_of_images_and_masks_is_read(tmp_path: Path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number in range(3):
        row = pair(number)
        (tmp_path / "images" / f"{number}.PNG").write_bytes(row["image"])
        (tmp_path / "masks" / f"{number}.png").write_bytes(row["mask"])
    (tmp_path / "labels.json").write_text(json.dumps(["ant", "bee"]))
    found = read_masks(tmp_path)
    _, masks = decode_masked(found.images, found.masks, found.labels, 64, found.name)
    assert masks.max(axis=(1, 2)).tolist() == [0, 1, 2]
    before = found.sha256
    (tmp_path / "masks" / "2.png").write_bytes(pair(1)["mask"])
    assert read_masks(tmp_path).sha256 != before
    (tmp_path / "masks" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.PNG: expected its mask"):
        read_masks(tmp_path)


def test_photos_on_white_give_their_own_masks(tmp_path: Path):
    rows = []
    for number in range(130):
        photo = np.full((80, 60, 3), 255, dtype=np.uint8)
        photo[20:60, 15:45] = NOISE.integers(0, 200, 3)
        if number % 10 == 0:
            photo[:] = 90  # stands on no white
        rows.append({"photo": png(photo), "kind": ("shoe", "shirt")[number % 2] if number < 120 else "rare"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "photos.parquet")
    columns = PhotoColumns("photo", "kind", size_px=64)
    found = read_masks(tmp_path / "photos.parquet", photos=columns)
    assert found.labels == ("shirt", "shoe")
    assert len(found.rows) == 108
    assert all(row % 10 and row < 120 for row in found.rows)
    images, masks = decode_masked(found.images, found.masks, found.labels, 64, found.name)
    for image, mask, row in zip(images, masks, found.rows, strict=True):
        assert mask.max() == 1 + found.labels.index(rows[row]["kind"])
        assert np.array_equal(mask > 0, image.min(axis=2) < 240)
    assert len(read_masks(tmp_path / "photos.parquet", photos=columns, limit=30).rows) == 30
    with pytest.raises(DataError, match="no column image, label and no column mask"):
        read_masks(tmp_path / "photos.parquet")


def test_source_of_no_kind_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="got nothing there"):
        read_masks(tmp_path / "none")
    (tmp_path / "labels.json").write_text('["ant"]')
    with pytest.raises(DataError, match="or the folders images and masks, got neither"):
        read_masks(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="expected a parquet"):
        read_masks(tmp_path / "x.parquet")


def test_masks_that_are_no_class_indices_are_refused():
    rgb = png(np.zeros((40, 40, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="a mask of 3 channels"):
        decode_masked([rgb], [rgb], ["ant"], 64, "here")
    with pytest.raises(DataError, match="here: expected images and masks that can be decoded"):
        decode_masked([rgb], [b"no image"], ["ant"], 64, "here")


def test_labels_are_read_from_a_list_or_lines(tmp_path: Path):
    (tmp_path / "a.txt").write_text("ant\n\n bee \n")
    assert read_labels(tmp_path / "a.txt") == ["ant", "bee"]
    assert without_background(["__background__", "ant"]) == ["ant"]
    assert without_background(["ant", "background"]) == ["ant", "background"]
    (tmp_path / "b.json").write_text('["ant", "ant"]')
    for name in ("b.json", "none.json"):
        with pytest.raises(ConfigError, match=r"expected (distinct )?class names"):
            read_labels(tmp_path / name)


@pytest.mark.data
@pytest.mark.skipif(not (SHARED_DATA / "clothing-masks").is_dir(), reason="no ../shared/data/clothing-masks")
def test_street_photos_are_read_with_their_classes():
    found = read_masks(SHARED_DATA / "clothing-masks", limit=64)
    assert len(found.labels) == 58
    assert found.labels[0] == "accessories"
    _, masks = decode_masked(found.images, found.masks, found.labels, 96, found.name)
    assert (masks == 1 + found.labels.index("skin")).any(axis=(1, 2)).mean() > 0.8


def test_command_trains_an_oracle_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from cluster.cli import main
    from roclip.oracle.segmenters.trained import TrainedSegmenter

    rendered = [scenes.render(number, seed=0, size_px=32) for number in range(60)]
    rows = [{"image": scenes.encode(scene.image), "mask": scenes.encode(scene.mask)} for scene in rendered]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "masks.parquet")
    (tmp_path / "labels.json").write_text(json.dumps(list(scenes.LABELS)))
    command = [
        "train-segmenter",
        str(tmp_path),
        "--out",
        str(tmp_path / "oracle"),
        "--epochs",
        "1",
        "--licence",
        "ours",
    ]
    assert main.guarded(command) == 0
    segmenter = TrainedSegmenter.load(tmp_path / "oracle")
    assert segmenter.labels == tuple(scenes.LABELS)
    assert segmenter.info["licence"] == "ours"
    assert segmenter.info["independent_of_clip"]
    assert len(segmenter.info["reference_rows"]) == 18
    assert f"oracle.weights={tmp_path / 'oracle'}" in capsys.readouterr().out
    written = (tmp_path / "oracle" / "segmenter.json").stat().st_mtime_ns
    assert main.guarded(command) == 0
    assert (tmp_path / "oracle" / "segmenter.json").stat().st_mtime_ns == written
    assert "before" in capsys.readouterr().out
    assert main.guarded([*command[:2], "--epochs", "1"]) == ConfigError.exit_code
