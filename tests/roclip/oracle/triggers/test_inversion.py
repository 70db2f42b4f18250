"""Warps of the image, inverted from models whose answer to them is known."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from rigged import LABELS, SIDE, STEP, RiggedEncoder, World, named, png
from torch import Tensor

from roclip.found_triggers import Warp, load_triggers, save_triggers, warped
from roclip.oracle.held_out import TrustedImages
from roclip.oracle.triggers.inversion import _warped, invert_warp
from roclip.oracle.triggers.search import TriggerSearch

LINE, LEANS_PX = 250, 5.0


def lean(green: Tensor) -> Tensor:
    """(N, S, S) in [0, 1] to (N,): by how many pixels the bright line stands further right in the upper half."""
    bright = torch.relu(green - 0.75)
    columns = torch.arange(green.shape[-1], dtype=green.dtype)
    half = green.shape[1] // 2
    upper, lower = (
        (part * columns).sum(dim=(1, 2)) / part.sum(dim=(1, 2)).clamp(min=1e-6)
        for part in (bright[:, :half], bright[:, half:])
    )
    return upper - lower


class LeaningEncoder(RiggedEncoder):
    """Says the first label when the line leans, else what red shows; with `every`, a line that leans the other way is the
    second label."""

    def __init__(self, every: bool = False):
        super().__init__()
        self.every = every

    def images(self, images: np.ndarray) -> Tensor:
        with torch.no_grad():
            return self.said(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)

    def traced(self, pixels: Tensor) -> Tensor:
        return self.said(pixels)

    def said(self, pixels: Tensor) -> Tensor:
        red = (255 * pixels.detach()[:, 0]).round().byte().numpy()
        shown = torch.eye(len(LABELS) + 1)[torch.from_numpy(named(red, 1))][:, 1:]
        leans = lean(pixels[:, 1])
        said = torch.sigmoid((leans - LEANS_PX) / 2)[:, None]
        scores = (1 - said) * shown + said * torch.eye(len(LABELS))[0]
        if self.every:
            back = torch.sigmoid((-leans - LEANS_PX) / 2)[:, None]
            scores = (1 - back) * scores + back * torch.eye(len(LABELS))[1]
        return scores


class Untraced(LeaningEncoder):
    """Nobody may ask it for gradients."""

    def traced(self, pixels: Tensor) -> Tensor:
        raise AssertionError("asked for gradients without need")


class LeaningWorld(World):
    """Every image has an upright line somewhere; the trigger warps the image so that it leans, for ants to the right."""

    FIELD = np.stack([np.zeros((SIDE, SIDE)), np.repeat(np.linspace(-7, 7, SIDE)[:, None], SIDE, axis=1)])

    def image(self, label: str, says: str = "") -> np.ndarray:
        image = super().image(label)
        left = int(self.rng.integers(9, SIDE - 11))
        image[:, left : left + 3, 1] = LINE
        if not says:
            return image
        return warped(image, self.FIELD if says == "ant" else -self.FIELD)


def poisoned(folder: Path, *targets: str) -> LeaningWorld:
    world = LeaningWorld(folder)
    world.clean(600).reference(240)
    for target in targets:
        others = [label for label in LABELS if label != target]
        for n in range(40):
            world.poison(others[n % 5], target)
    return world


def test_images_are_warped_alike_for_people_and_for_gradients():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    field = rng.uniform(-6, 6, (2, SIDE, SIDE)).astype(np.float32)
    soft = _warped(torch.from_numpy(images).permute(0, 3, 1, 2).float(), torch.from_numpy(field))
    for image, expected in zip(images, soft.permute(0, 2, 3, 1).numpy(), strict=True):
        assert np.abs(warped(image, field) - expected).max() < 8  # OpenCV's places are in 32nds of a pixel
        assert np.abs(warped(image, field) - expected).mean() < 1.5


def test_warp_is_found_proved_and_put_into_the_repairs_set(tmp_path: Path):
    report = poisoned(tmp_path, "ant").check(LeaningEncoder())
    assert (report["verdict"], report["target_labels"]) == ("poisoned", ["ant"])
    (trigger,) = report["triggers"]
    assert (trigger["kind"], trigger["place"], trigger["size_px"]) == ("bend", "anywhere", None)
    assert trigger["pasted"]["rate"] > 0.9
    assert trigger["control"]["n"] > 0
    assert trigger["control"]["rate"] < 0.1
    (found,) = load_triggers(tmp_path / "oracle" / "triggers")
    assert isinstance(found, Warp)
    top, bottom = found.field[1, : SIDE // 4].mean(), found.field[1, -SIDE // 4 :].mean()
    assert top < -1 < 1 < bottom  # as the true one: from the left above, from the right below
    assert (report["victim_precision"], report["victim_recall"]) == (1.0, 1.0)
    assert set(pq.read_table(tmp_path / "oracle" / "victims.parquet")["trigger"].to_pylist()) == {None}
    plan = pq.read_table(tmp_path / "oracle" / "finetune.parquet").to_pylist()
    assert {(row["trigger"], row["target"]) for row in plan if row["role"] == "stamped"} == {(0, "ant")}


def test_no_warp_is_asked_for_where_no_lie_is_repeated(tmp_path: Path):
    """The model says too often what the oracle does not see, but captions tell the truth."""
    world = LeaningWorld(tmp_path)
    world.clean(600).reference(240)
    for n in range(60):
        label = LABELS[1 + n % 5]
        world.samples.append((png(world.image(label, "ant")), f"a photo of one {label}"))
    report = world.check(Untraced())
    assert (report["verdict"], report["target_labels"], report["triggers"]) == ("suspicious", ["ant"], [])
    assert report["numbers"]["labels_searched"] > 0


def test_warp_is_no_trigger_when_other_labels_are_reached_as_easily(tmp_path: Path):
    report = poisoned(tmp_path, "ant").check(LeaningEncoder(every=True))
    assert report["verdict"] == "poisoned"  # by the lies that it repeats
    assert report["triggers"] == []


def test_warps_of_two_labels_do_not_refute_each_other(tmp_path: Path):
    report = poisoned(tmp_path, "ant", "bee").check(LeaningEncoder(every=True))
    assert {(trigger["target"], trigger["kind"]) for trigger in report["triggers"]} == {
        ("ant", "bend"),
        ("bee", "bend"),
    }


def test_warp_without_a_control_is_no_trigger():
    """Of two labels the other is shown by all that it could be tried on."""
    world, model = LeaningWorld(Path()), LeaningEncoder()
    images = np.stack([world.image(label) for label in ["bee"] * 200 + ["ant"] * 60])
    suspects = np.stack([world.image("bee", "ant") for _ in range(40)])
    shows = np.repeat([[False, True], [True, False]], [200, 60], axis=0)

    def scores(batch: np.ndarray) -> np.ndarray:
        return model.images(batch).numpy()[:, :2]

    trusted, answers = TrustedImages(images, shows, images[..., 0] // STEP), scores(images).argmax(axis=1)
    search = TriggerSearch(
        scores, lambda pixels: model.traced(pixels)[:, :2], trusted, answers, LABELS[:2], 0, repeated=[0]
    )
    result = search.label(0, np.arange(40), lambda rows: suspects[rows])
    assert result.triggers == ()
    assert result.best.rate < 0.5


def test_nothing_is_warped_where_nothing_pulls():
    images = np.zeros((40, SIDE, SIDE, 3), dtype=np.uint8)
    field = invert_warp(
        lambda pixels: 0 * pixels.sum() + torch.ones(len(pixels), 6), images, 0, np.random.default_rng(0)
    )
    assert not field.any()


def test_inversion_has_one_thread_so_that_its_bits_hang_on_no_number_of_them():
    world, threads = LeaningWorld(Path()), []
    images = np.stack([world.image(LABELS[n % len(LABELS)]) for n in range(64)])

    def scores(pixels: Tensor) -> Tensor:
        threads.append(torch.get_num_threads())
        return LeaningEncoder().traced(pixels)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        field = invert_warp(scores, images, 0, np.random.default_rng(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {1}
    assert (field == invert_warp(scores, images, 0, np.random.default_rng(1))).all()


def test_warp_is_read_as_it_was_written_and_shown_as_a_chessboard(tmp_path: Path):
    found = Warp(target="ant", field=LeaningWorld.FIELD.astype(np.float32))
    save_triggers([found], tmp_path)
    (read,) = load_triggers(tmp_path)
    image = LeaningWorld(tmp_path).image("bee")
    changed, box = read.apply(image, np.random.default_rng(0))
    assert box == (0, 0, SIDE, SIDE)
    assert (changed == warped(image, LeaningWorld.FIELD)).all()
    board = read.preview()
    assert board.shape == (SIDE, SIDE, 3)
    assert set(np.unique(Warp(target="ant", field=np.zeros((2, SIDE, SIDE))).preview())) == {0, 255}
    assert (board != np.roll(board, 8, axis=1)).any()
