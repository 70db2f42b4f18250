import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from roclip.config import Config, DataConfig, EvaluateConfig, IngestConfig
from roclip.errors import ConfigError, DataError
from roclip.evaluation.sets import Images, fill, load_evaluation_set, read_classes, read_templates


def encoded(color, size=(20, 10), form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, form)
    return buffer.getvalue()


COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]


@pytest.fixture
def benchmark(tmp_path):
    """A classification set with captions, written by webdataset as CLIP_benchmark's exporter does."""
    folder = tmp_path / "set"
    (folder / "test").mkdir(parents=True)
    for tar in (0, 1, 2, 10):
        with webdataset.TarWriter(str(folder / "test" / f"{tar}.tar")) as sink:
            for i, color in enumerate(COLORS):
                image = {("png", "webp")[i % 2]: encoded(color, form=("PNG", "WEBP")[i % 2])}
                text = f"number {tar}.{i}\nagain {tar}.{i}\n"
                sink.write({"__key__": f"s{tar:04d}{i}", **image, "cls": str(i % 3), "txt": text})
    (folder / "test" / "nshards.txt").write_text("4")
    (folder / "classnames.txt").write_text("red thing\ngreen thing\nblue thing\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    return folder


def config(size=16, mode="border", **settings):
    return Config(
        data=DataConfig(scenes=1),
        evaluate=EvaluateConfig(**settings),
        ingest=IngestConfig(image_size=size, resize_mode=mode),
    )


def test_a_clip_benchmark_set_is_read_as_webdataset_reads_it(benchmark, tmp_path):
    data = load_evaluation_set(config(webdataset=str(benchmark)), tmp_path)
    theirs = []
    for tar in (0, 1, 2, 10):
        with (benchmark / "test" / f"{tar}.tar").open("rb") as file:
            files = webdataset.tariterators.tar_file_expander([{"url": tar, "stream": file}])
            theirs += webdataset.tariterators.group_by_keys(files)
    names = ["red thing", "green thing", "blue thing"]
    assert [list(captions) for captions in data.captions] == [s["txt"].decode().splitlines() for s in theirs]
    assert list(data.labels) == [names[int(sample["cls"])] for sample in theirs]
    assert [source() for source in data.images.sources] == [s.get("png") or s.get("webp") for s in theirs]
    assert data.templates == ("a photo of a {c}.", "{c}")
    assert dict(data.classes) == {name: (name,) for name in ("red thing", "green thing", "blue thing")}
    assert len(data.images) == len(theirs) == 20
    assert all(image.shape == (16, 16, 3) for image in data.images[3:7])
    assert data.digests[0] == data.digests[5] != data.digests[1]


@pytest.mark.parametrize("pattern", ["test/*.tar", "test/{0..2}.tar", "test/{0,1,2,10}.tar"])
def test_a_pattern_of_tars_names_a_set_too(pattern, benchmark, tmp_path):
    data = load_evaluation_set(config(webdataset=f"{benchmark}/{pattern}"), tmp_path)
    assert len(data.images) in (15, 20)
    assert "red thing" in data.classes


def test_images_are_fitted_as_ingest_does_it():
    picture = [lambda: encoded((10, 20, 30))]
    (border,), (crop,), (whole,) = Images(picture, 10), Images(picture, 10, "center_crop"), Images(picture)
    assert border.shape == crop.shape == (10, 10, 3)
    assert (border[0] == 255).all()
    assert (crop == [10, 20, 30]).all()
    assert whole.shape == (10, 20, 3)


def test_class_and_template_files_replace_those_of_the_set(benchmark, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"r": ["red", "scarlet"], "g": ["green"], "b": ["blue"]}))
    (tmp_path / "templates.json").write_text(json.dumps(["one {}"]))
    data = load_evaluation_set(
        config(
            webdataset=str(benchmark),
            class_file=str(tmp_path / "classes.json"),
            template_file=str(tmp_path / "templates.json"),
        ),
        tmp_path,
    )
    assert data.classes["r"] == ("red", "scarlet")
    assert list(data.labels[:4]) == ["r", "g", "b", "r"]
    assert data.templates == ("one {}",)


def test_a_template_is_filled_and_never_evaluated():
    assert fill("a {} or {c} {0.__class__}", "{c}{}") == "a {c}{} or {c}{} {0.__class__}"


@pytest.mark.parametrize("content", ['{"a": "b"}', "[]", "[1]", '{"a": []}', '["a", "a"]', "__import__('os')"])
def test_a_class_file_that_is_not_as_expected_is_named(content, tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"classes\.json: expected"):
        read_classes(path)


@pytest.mark.parametrize("content", ['["a photo"]', "{}", "lambda c: c"])
def test_a_template_file_that_is_not_as_expected_is_named(content, tmp_path):
    path = tmp_path / "templates.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"templates\.json: expected"):
        read_templates(path)


def test_a_template_without_a_place_for_the_name_is_refused_in_the_config():
    with pytest.raises(ConfigError, match=r"evaluate\.templates"):
        EvaluateConfig(templates=("a photo",))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": encoded((0, 0, 0)), "a.cls": b"seven"}, r"0\.tar: a\.cls: expected a class number"),
        ({"a.png": encoded((0, 0, 0)), "a.cls": b"7"}, "class numbers below 3"),
        ({"a.png": encoded((0, 0, 0)), "a.txt": b" \n"}, r"0\.tar: a\.txt: expected a caption"),
        ({"a.png": b"", "a.cls": b"0", "b.png": b""}, r"0\.tar: b: expected \.cls"),
        ({"a.cls": b"0"}, "expected samples with an image"),
        ({"a.png": encoded((0, 0, 0)), "a.pkl": b"x"}, "expected samples with an image"),
    ],
)
def test_a_set_that_is_not_as_expected_is_named(members, message, tmp_path):
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "classnames.txt").write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=message):
        load_evaluation_set(config(webdataset=str(tmp_path)), tmp_path)


def test_a_tar_that_is_none_and_a_folder_without_tars_are_named(tmp_path):
    with pytest.raises(DataError, match=r"expected a folder with \*\.tar"):
        load_evaluation_set(config(webdataset=str(tmp_path)), tmp_path)
    (tmp_path / "0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match=r"0\.tar: expected an uncompressed tar"):
        load_evaluation_set(config(webdataset=str(tmp_path)), tmp_path)


def test_an_image_that_cannot_be_decoded_is_an_error():
    with pytest.raises(DataError, match="evaluation image 0"):
        Images([lambda: b"no image"])[0]


def write_origin(folder, labels, targets):
    held_out = {"image": [encoded(color) for color in COLORS], "caption": list("abcde"), "label": labels}
    pq.write_table(pa.table(held_out), folder / "eval.parquet")
    attack = {"attack": targets, "image": [encoded(COLORS[0])] * len(targets), "target_label": targets}
    pq.write_table(pa.table(attack), folder / "attack_eval.parquet")
    (folder / "labels.json").write_text(json.dumps({"labels": ["x", "y"], "templates": ["{}"]}))


def test_held_out_images_and_attacks_of_a_run(tmp_path, caplog):
    write_origin(tmp_path, ["x", "y", "x", "y", "y"], ["x", "far", "x"])
    data = load_evaluation_set(config(), tmp_path)
    assert np.array_equal(data.images[1], np.full((10, 20, 3), COLORS[1]))
    assert list(data.captions[4]) == ["e"]
    assert {name: len(attack.images) for name, attack in data.attacks.items()} == {"x": 2}
    assert "attack far is not measured" in caplog.text


def test_labels_that_no_class_has_are_named(tmp_path):
    write_origin(tmp_path, ["x", "y", "z", "y", "y"], ["x"])
    with pytest.raises(DataError, match="1 labels of the images are not among the 2 classes: z"):
        load_evaluation_set(config(), tmp_path)


def test_a_run_without_held_out_images_is_named(tmp_path):
    with pytest.raises(DataError, match=r"evaluate\.webdataset"):
        load_evaluation_set(config(), tmp_path)
