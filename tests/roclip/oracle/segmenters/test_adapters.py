"""Oracles from elsewhere: real networks and real files, local only, hostile ones refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from rigged import LABELS, SIDE, png

from roclip.errors import CheckpointError, ConfigError, DataError
from roclip.oracle.segmenters.annotations import UNKNOWN_SHARE, AnnotatedSegmenter
from roclip.oracle.segmenters.base import MIN_AREA, UNMEASURED
from roclip.oracle.segmenters.opening import open_segmenter
from roclip.oracle.segmenters.torchvision_net import TorchvisionSegmenter
from roclip.storage import sha256_file

VOC = torchvision.models.segmentation.DeepLabV3_ResNet50_Weights.DEFAULT.meta["categories"]


class Bomb:
    """Whoever unpickles it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def lraspp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that see a cat wherever they look: its score is raised."""
    torch.manual_seed(0)
    net = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21)
    state = net.state_dict()
    state["high_classifier.bias" if "high_classifier.bias" in state else "classifier.high_classifier.bias"][
        VOC.index("cat")
    ] += 50
    path = tmp_path_factory.mktemp("weights") / "lraspp.pth"
    torch.save(state, path)
    return path


def pixels(number: int, side: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, side, side, 3), dtype=np.uint8)


def test_torchvision_semantic_network_sees_with_local_weights(lraspp: Path):
    segmenter = open_segmenter(
        f"torchvision:lraspp_mobilenet_v3_large:{lraspp}", ["feline", "sofa", "unicorn"], {"cat": "feline"}
    )
    areas = segmenter.areas(pixels(2))
    assert areas.shape == (2, 3)
    assert (areas[:, 0] > 0.99).all()
    assert (segmenter.masks(pixels(1)) == 1).all()
    assert segmenter.regions(pixels(1))[0][0].box == (0, 0, 48, 48)
    assert segmenter.covers("feline")
    assert not segmenter.covers("unicorn")  # VOC has none: unchecked
    assert segmenter.calibration["feline"] == UNMEASURED
    assert segmenter.info["sha256"] == sha256_file(lraspp)
    assert segmenter.info["independent_of_clip"]
    assert not segmenter.info["calibrated"]
    assert segmenter.info["classes"] == {"feline": ["cat"], "sofa": ["sofa"]}


def test_torchvision_answers_the_same_for_an_image_alone(lraspp: Path):
    segmenter = TorchvisionSegmenter("lraspp_mobilenet_v3_large", lraspp, size_px=64, batch_size=2)
    together = segmenter.areas(pixels(3))
    assert together.shape == (3, 20)
    assert np.allclose(together[2:], segmenter.areas(pixels(3)[2:]), atol=1e-6)


@pytest.mark.slow
def test_torchvision_instance_network_sees_with_local_weights(tmp_path: Path):
    torch.manual_seed(0)
    net = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    state = net.state_dict()
    state["roi_heads.box_predictor.cls_score.bias"][2] += 50  # every box is a dog
    state["roi_heads.mask_predictor.mask_fcn_logits.bias"][2] += 50  # that fills it
    torch.save({"model": state}, tmp_path / "mask.pth")
    spec = f"torchvision:maskrcnn_resnet50_fpn:{tmp_path / 'mask.pth'}"
    with pytest.raises(CheckpointError, match="names of 2 classes"):
        open_segmenter(spec, ["dog"])
    (tmp_path / "labels.json").write_text(json.dumps(["cat", "dog"]))
    segmenter = TorchvisionSegmenter("maskrcnn_resnet50_fpn", tmp_path / "mask.pth", size_px=128)
    areas = segmenter.areas(pixels(1))
    assert segmenter.labels == ("cat", "dog")
    assert areas[0, 1] > 0.05
    assert areas[0, 0] == 0
    assert {region.label for region in segmenter.regions(pixels(1))[0]} == {"dog"}


def test_weights_that_are_missing_are_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"lraspp\.pth: expected a file of weights, got none"):
        open_segmenter(f"torchvision:lraspp_mobilenet_v3_large:{tmp_path / 'lraspp.pth'}", ["cat"])


@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_weights_are_refused_and_nothing_runs(tmp_path: Path, protocol: int):
    bomb = tmp_path / "went off"
    torch.save({"classifier.4.weight": Bomb(bomb)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"x": Bomb(bomb)}, protocol))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match="refused, expected safetensors or a pickle of tensors alone"):
            open_segmenter(f"torchvision:lraspp_mobilenet_v3_large:{tmp_path / name}", ["cat"])
    assert not bomb.exists()


def test_weights_of_another_network_are_refused(lraspp: Path):
    with pytest.raises(CheckpointError, match="expected weights of fcn_resnet50"):
        open_segmenter(f"torchvision:fcn_resnet50:{lraspp}", ["cat"])
    with pytest.raises(ConfigError, match="expected one of deeplabv3"):
        open_segmenter(f"torchvision:resnet18:{lraspp}", ["cat"])


def test_oracle_that_knows_no_label_is_refused(lraspp: Path):
    with pytest.raises(DataError, match="knows any of unicorn"):
        open_segmenter(f"torchvision:lraspp_mobilenet_v3_large:{lraspp}", ["unicorn"])


@pytest.mark.parametrize("spec", ["nothing/there", "torchvision:deeplabv3_resnet50", "masks:", "ftp:x"])
def test_unknown_spec_lists_the_kinds(spec: str):
    with pytest.raises(ConfigError, match="torchvision:NAME:FILE"):
        open_segmenter(spec, ["cat"])


@pytest.fixture
def annotated(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A folder of six images, each with one thing of a label."""
    images, masks = pixels(6, SIDE), np.zeros((6, SIDE, SIDE), dtype=np.uint8)
    for number in range(6):
        masks[number, 4:20, 8 : 12 + number] = 1 + number
    for name, arrays in (("images", images), ("masks", masks)):
        (tmp_path / "drawn" / name).mkdir(parents=True)
        for number, array in enumerate(arrays):
            (tmp_path / "drawn" / name / f"{number}.png").write_bytes(png(array))
    (tmp_path / "drawn" / "labels.json").write_text(json.dumps(["null", *LABELS]))
    return tmp_path / "drawn", images, masks


def test_drawn_masks_are_exact_and_silent_about_other_images(annotated: tuple[Path, np.ndarray, np.ndarray]):
    folder, images, masks = annotated
    segmenter = open_segmenter(f"masks:{folder}", LABELS)
    assert np.array_equal(segmenter.masks(images), masks)
    assert segmenter.info["calibrated"]
    assert segmenter.info["independent_of_clip"]
    unknown = segmenter.areas(images ^ 1)
    row = segmenter.calibration["bee"]
    assert np.allclose(unknown, UNKNOWN_SHARE)
    assert ((unknown >= row.seen) & (unknown < row.clear)).all()  # may be there, is not certain: contradicts nobody
    assert segmenter.masks(images ^ 1).max() == 0


def test_drawn_masks_follow_the_label_map(annotated: tuple[Path, np.ndarray, np.ndarray]):
    folder, images, masks = annotated
    segmenter = AnnotatedSegmenter(folder, ["insect", "pet", "yak"], {"bee": "insect", "ant": "insect", "cat": "pet"})
    assert np.array_equal(segmenter.masks(images[:3]) > 0, masks[:3] > 0)
    assert segmenter.masks(images).max(axis=(1, 2)).tolist() == [1, 1, 2, 0, 0, 0]
    assert [segmenter.covers(label) for label in segmenter.labels] == [True, True, False]
    assert segmenter.info["classes"] == {"insect": ["ant", "bee"], "pet": ["cat"]}
    assert (segmenter.areas(images ^ 1) < 2 * MIN_AREA).all()  # two classes of one label are not twice as sure
    with pytest.raises(DataError, match="expected masks of some of the labels yak"):
        AnnotatedSegmenter(folder, ["yak"])


def test_drawn_masks_at_another_side_are_found(annotated: tuple[Path, np.ndarray, np.ndarray]):
    from roclip.data.reader import decode

    folder, images, masks = annotated
    segmenter = AnnotatedSegmenter(folder, LABELS)
    larger = np.stack([decode(png(image), 2 * SIDE) for image in images])
    assert np.array_equal(segmenter.masks(larger)[:, ::2, ::2], masks)
