"""What an oracle can be asked about: any step, any open_clip checkpoint, any data; hostile ones are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kit import TINY_MODEL, preset, scene_samples, write_shard
from safetensors.torch import save_file

from cluster.cli import main
from cluster.oracle.case import Case, case_of
from cluster.oracle.job import oracle
from cluster.oracle.request import OracleRequest
from roclip.attacks import scenes
from roclip.config import Config, DataConfig, OracleConfig
from roclip.data.reader import BadSampleError, ShardReader
from roclip.data.shards import Manifest
from roclip.errors import CheckpointError, ConfigError, DataError
from roclip.model.towers import Encoder, Towers

PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]}


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """A model as open_clip makes it."""
    torch.manual_seed(0)
    open_clip.factory._MODEL_CONFIGS["case-tiny"] = json.loads(TINY_MODEL)
    return open_clip.create_model("case-tiny", pretrained=None)


@pytest.fixture
def download(network: torch.nn.Module, tmp_path: Path) -> Path:
    """A folder as a hub gives it."""
    folder = tmp_path / "download"
    folder.mkdir()
    config = {"model_cfg": json.loads(TINY_MODEL), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {key: value.contiguous() for key, value in network.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def as_pickle(folder: Path, state: object, name: str = "open_clip_pytorch_model.bin") -> Path:
    (folder / "open_clip_model.safetensors").unlink(missing_ok=True)
    torch.save(state, folder / name)
    return folder


def settings(**changes) -> Config:
    return Config(data=DataConfig(shards="none"), oracle=OracleConfig(labels=tuple(scenes.LABELS), **changes))


def case(download: Path, tmp_path: Path, data: str | Path, config: Config | None = None, **named) -> Case:
    return case_of(config or settings(), tmp_path / "run", "x", OracleRequest(str(download), str(data), **named))


def samples(found: Case) -> list[tuple[str, str]]:
    """Key and caption of every readable sample."""
    rows = []
    for record in Manifest(found.data.shards).records():
        reader = ShardReader(found.data.shards, record, caption_key=found.data.caption_key)
        for number in range(record.samples):
            try:
                rows.append((reader.key(number), reader.read(number)[1]))
            except BadSampleError:
                rows.append((reader.key(number), ""))
        reader.close()
    return rows


def test_foreign_checkpoint_sees_and_reads_as_in_open_clip(download: Path, network: torch.nn.Module):
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(PREPROCESS[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        network.eval()
        seen = torch.nn.functional.normalize(network.encode_image((pixels - mean) / std), dim=-1)
        read = torch.nn.functional.normalize(network.encode_text(open_clip.tokenize(["a cat"], 24)), dim=-1)
    encoder = Encoder.load(download)
    assert torch.allclose(encoder.images(image), seen, atol=1e-5)
    assert torch.allclose(encoder.texts(["a cat"]), read, atol=1e-5)


def test_pickle_of_tensors_alone_is_read(download: Path, network: torch.nn.Module):
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    expected = Encoder.load(download).texts(["a cat"])
    as_pickle(download, {"epoch": 3, "state_dict": state}, "open_clip_pytorch_model.pt")
    assert torch.equal(Encoder.load(download).texts(["a cat"]), expected)


def test_hostile_pickle_is_refused_and_nothing_runs(download: Path, network: torch.nn.Module, tmp_path: Path):
    bomb = tmp_path / "went off"
    as_pickle(download, {**network.state_dict(), "extra": Bomb(bomb)})
    with pytest.raises(CheckpointError, match=r"open_clip_pytorch_model\.bin: refused"):
        Towers.load(download)
    config = preset(tmp_path, f"data: {{shards: {tmp_path / 'none'}}}\nruns: {tmp_path / 'runs'}\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(scene_samples(0, 1)[0][0])
    (tmp_path / "photos" / "a.txt").write_text("a heart")
    asked = ["oracle.labels=[heart,ring]", "oracle.weights=masks:x", "--checkpoint", str(download), "--in-process"]
    code = main.guarded(["oracle", str(config), *asked, "--data", str(tmp_path / "photos")])
    assert code == CheckpointError.exit_code
    assert not bomb.exists()


@pytest.mark.parametrize("config", ["", "{}", '{"model_cfg": {"embed_dim": 1}}', '{"model_cfg": 3}'])
def test_foreign_config_that_is_no_model_is_refused(download: Path, config: str):
    (download / "open_clip_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"download: (expected|cannot build)"):
        Towers.load(download)


def test_weights_of_another_model_are_refused(download: Path):
    save_file({"logit_scale": torch.zeros(1)}, download / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match="cannot build the model"):
        Towers.load(download)
    (download / "open_clip_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="got no weights"):
        Towers.load(download)


def test_parquet_becomes_shards_once(download: Path, tmp_path: Path):
    pictures = scene_samples(0, 7, size_px=32)
    rows = [{"picture": {"bytes": image, "path": "x"}, "text": caption} for image, caption in pictures]
    rows[2]["picture"]["bytes"] = b"no image"
    rows[3]["text"] = " "
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    data = DataConfig(shards="none", image_col="picture", caption_col="text")
    config = Config(data=data, oracle=OracleConfig(labels=("heart",)))
    found = case(download, tmp_path, tmp_path / "data.parquet", config)
    captions = [caption for _, caption in pictures]
    captions[3] = ""
    assert samples(found) == [(f"{number:09d}", caption) for number, caption in enumerate(captions)]
    assert not found.of_newest
    assert found.out == tmp_path / "run" / "x" / "oracle-data"
    noted = pq.read_table(found.data.shards.parent / "00000.parquet")
    assert noted["source"].to_pylist()[:2] == ["row 0", "row 1"]
    tar = found.data.shards.parent / "00000.tar"
    before = tar.stat().st_mtime_ns
    assert case(download, tmp_path, tmp_path / "data.parquet", config) == found
    assert tar.stat().st_mtime_ns == before
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "data.parquet")
    assert len(samples(case(download, tmp_path, tmp_path / "data.parquet", config))) == 1
    with pytest.raises(DataError, match="no column image, caption; it has picture, text"):
        case(download, tmp_path, tmp_path / "data.parquet")


def test_folder_of_images_and_texts_becomes_shards(download: Path, tmp_path: Path):
    for number, (image, caption) in enumerate(scene_samples(0, 3, size_px=32)):
        folder = tmp_path / "photos" / ("a" if number else "b")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(image)
        if number != 1:
            (folder / f"{number}.txt").write_bytes(caption.encode() + b"\xff\n")
    found = case(download, tmp_path, tmp_path / "photos")
    texts = [caption for _, caption in samples(found)]
    assert texts[0] == ""  # a/1.png has no caption
    assert [text[:-1] for text in texts[1:]] == [caption for _, caption in scene_samples(0, 3, size_px=32)][::2][::-1]
    with pytest.raises(DataError, match="0 images and no such caption"):
        case(download, tmp_path, download)


def test_shards_and_tars_are_taken_as_they_are(download: Path, tmp_path: Path):
    write_shard(tmp_path / "shards", 0, scene_samples(0, 4, size_px=32))
    Manifest(tmp_path / "shards").finish({})
    assert case(download, tmp_path, tmp_path / "shards").data.shards == tmp_path / "shards"
    tars = tmp_path / "tars"
    tars.mkdir()
    shutil.copy(tmp_path / "shards" / "00000.tar", tars)
    found = case(download, tmp_path, tars / "{00000..00000}.tar")
    assert len(samples(found)) == 4
    assert found.data.shards.parent == found.out
    assert sorted(path.name for path in tars.iterdir()) == ["00000.tar"]


def test_missing_things_are_named(download: Path, tmp_path: Path):
    with pytest.raises(DataError, match="got nothing there"):
        case(download, tmp_path, tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"step-00000007: expected a folder .* one of the steps"):
        case_of(settings(), tmp_path / "run", "x", OracleRequest("step-00000007"))
    write_shard(tmp_path / "shards", 0, scene_samples(0, 4, size_px=32))
    nameless = Config(data=DataConfig(shards="none"))
    with pytest.raises(ConfigError, match=r"oracle\.labels: expected the labels"):
        case(download, tmp_path, tmp_path / "shards", nameless)
    with pytest.raises(DataError, match="--truth"):
        case(download, tmp_path, tmp_path / "shards", truth=tmp_path / "none")
    with pytest.raises(DataError, match=r"oracle\.trusted_file"):
        case(download, tmp_path, tmp_path / "shards", settings(trusted_file=str(tmp_path / "none")))


def test_labels_come_from_a_file(download: Path, tmp_path: Path):
    write_shard(tmp_path / "shards", 0, scene_samples(0, 4, size_px=32))
    (tmp_path / "labels.txt").write_text("heart\nring\n")
    config = Config(data=DataConfig(shards="none"), oracle=OracleConfig(label_file=str(tmp_path / "labels.txt")))
    found = case(download, tmp_path, tmp_path / "shards", config)
    assert found.data.labels == ["heart", "ring"]
    assert found.data.templates == ["a photo of a {}", "a picture of a {}", "{}"]
    assert found.data.trusted is None


def trusted_scenes(path: Path, number: int) -> list[dict[str, bytes]]:
    rendered = [scenes.render(index, seed=1, size_px=32, num_objects=1) for index in range(number)]
    rows = [{"image": scenes.encode(scene.image), "mask": scenes.encode(scene.mask)} for scene in rendered]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return rows


def test_foreign_checkpoint_is_judged_on_foreign_data_with_drawn_masks(download: Path, tmp_path: Path):
    rows = trusted_scenes(tmp_path / "trusted.parquet", 260)
    (tmp_path / "labels.json").write_text(json.dumps(list(scenes.LABELS)))
    photos = [{"image": row["image"], "caption": "a picture"} for row in rows]
    pq.write_table(pa.Table.from_pylist(photos), tmp_path / "photos.parquet")
    pq.write_table(pa.table({"key": ["000000001"]}), tmp_path / "poison.parquet")
    config = preset(tmp_path, f"data: {{shards: none}}\nruns: {tmp_path / 'runs'}\n")
    command = ["oracle", str(config), f"oracle.label_file={tmp_path / 'labels.json'}", "--in-process"]
    command += [f"oracle.weights=masks:{tmp_path / 'trusted.parquet'}", "--checkpoint", str(download)]
    command += ["--data", str(tmp_path / "photos.parquet"), "--out", str(tmp_path / "report")]
    truth = ["--truth", str(tmp_path / "poison.parquet")]
    assert main.guarded([*command, *truth]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["verdict"] == "inconclusive"  # nobody says how often an honest model errs
    assert report["numbers"]["distinct_images"] == 260
    assert report["victim_recall"] == 0
    assert report["oracle"]["name"] == "masks drawn by people"
    assert report["subject"]["trusted_sha256"] is None
    assert main.guarded([*command, f"oracle.trusted_file={tmp_path / 'trusted.parquet'}"]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["numbers"]["reference_images"] == 260
    assert report["numbers"]["labels_checked"] == len(scenes.LABELS)


def test_uncalibrated_oracle_is_calibrated_where_trusted_images_are(download: Path, tmp_path: Path):
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    (tmp_path / "labels.json").write_text(json.dumps(["hearts", "ring"]))
    trusted_scenes(tmp_path / "trusted.parquet", 20)
    write_shard(tmp_path / "shards", 0, scene_samples(0, 8, size_px=32))
    Manifest(tmp_path / "shards").finish({})
    spec = f"torchvision:lraspp_mobilenet_v3_large:{tmp_path / 'net.pth'}"
    config = settings(weights=spec, trusted_file=str(tmp_path / "trusted.parquet"), reference_frac=0.5)
    request = OracleRequest(str(download), str(tmp_path / "shards"), out=tmp_path / "report", in_process=True)
    oracle(config, tmp_path / "run", "x", request)
    told = json.loads((tmp_path / "report" / "report.json").read_text())["oracle"]
    assert told["calibrated"]
    assert sorted(told["calibration"]) == ["heart", "ring"]  # the others have no class: unchecked
    assert told["classes"] == {"heart": ["hearts"], "ring": ["ring"]}
