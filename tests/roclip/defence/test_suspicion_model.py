import torch

from roclip.defence.suspicion_model import VIEW_PX, SuspicionModel
from roclip.evaluation.ranking import auroc

N = 400


def world(seed: int = 0, side: int = 32, patch: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smooth images, a tenth of them with a small patch somewhere; whether they have it; inaccurate suspicion scores."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (N, 3, 4, 4), generator=generator).float()
    images = torch.nn.functional.interpolate(coarse, side, mode="bilinear").to(torch.uint8)
    square = torch.tensor([[0, 255], [255, 0]]).repeat_interleave(2, 0).repeat_interleave(2, 1).to(torch.uint8)
    triggered = torch.arange(N) % 10 == 0
    for number in triggered.nonzero().flatten().tolist() if patch else ():
        top, left = torch.randint(0, side - 4, (2,), generator=generator).tolist()
        images[number, :, top : top + 4, left : left + 4] = square
    suspicion = torch.rand(N, generator=generator)
    suspicion[triggered] = suspicion[triggered].sqrt()  # 0.67 on average, not 0.5
    return images, triggered, suspicion


def passes(model: SuspicionModel, images: torch.Tensor, suspicion: torch.Tensor, number: int) -> torch.Tensor:
    places = torch.arange(len(images))
    for _ in range(number):
        predictions = model(images, places, suspicion)
    return predictions


def test_a_shared_trigger_is_found_from_scores_that_are_often_wrong():
    model = SuspicionModel(32)
    for seed in range(60):
        images, triggered, suspicion = world(seed)
        predictions = passes(model, images, suspicion, 1)
    assert auroc(suspicion.numpy(), triggered.numpy()) < 0.8
    assert auroc(predictions.numpy(), triggered.numpy()) > 0.95


def test_a_faint_pattern_over_the_whole_image_is_found():
    model, generator = SuspicionModel(32), torch.Generator().manual_seed(7)
    pattern = torch.randint(0, 256, (3, 32, 32), generator=generator).float()
    for seed in range(40):
        images, triggered, suspicion = world(seed, patch=False)
        images[triggered] = (0.9 * images[triggered] + 0.1 * pattern).to(torch.uint8)
        predictions = passes(model, images, suspicion, 1)
    assert auroc(predictions.numpy(), triggered.numpy()) > 0.95


def test_it_predicts_before_it_learns_and_the_same_after_a_checkpoint():
    images, _, suspicion = world()
    first, second, third = SuspicionModel(32, seed=3), SuspicionModel(32, seed=3), SuspicionModel(32, seed=4)
    assert torch.equal(
        passes(first, images[:60], suspicion[:60], 1), passes(second, images[:60], 1 - suspicion[:60], 1)
    )
    third.load_state_dict(first.state_dict())
    assert torch.equal(passes(first, images, suspicion, 2), passes(third, images, suspicion, 2))


def test_only_the_pairs_in_their_places_count():
    images, _, suspicion = world()
    places = torch.arange(0, N, 3)
    spoilt = images.clone()
    spoilt[1::3] = 0
    mine, theirs = SuspicionModel(32), SuspicionModel(32)
    for _ in range(2):
        predictions = mine(images, places, suspicion[places])
        assert torch.equal(predictions, theirs(spoilt, places, suspicion[places]))
    assert predictions.shape == places.shape


def test_no_pair_or_one_is_no_error():
    images, _, suspicion = world()
    model, none = SuspicionModel(32), torch.zeros(0, dtype=torch.int64)
    assert model(images, none, suspicion[:0]).shape == (0,)
    assert model(images, none.new_zeros(1), suspicion[:1]).tolist() == suspicion[:1].tolist()


def test_large_images_are_brought_down():
    images, _, suspicion = world()
    large = images[:8].repeat_interleave(4, 2).repeat_interleave(4, 3)
    small = images[:8].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert large.shape[-1] == 2 * VIEW_PX
    places = torch.arange(8)
    assert torch.equal(
        SuspicionModel(128)(large, places, suspicion[:8]), SuspicionModel(64)(small, places, suspicion[:8])
    )
