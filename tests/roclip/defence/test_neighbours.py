import torch
import torch.nn.functional as F

from roclip.defence.bag_of_words import BagOfWords
from roclip.defence.image_descriptor import PARTS, ImageDescriptor, image_hashes, raw_descriptors
from roclip.defence.neighbours import Neighbours
from roclip.evaluation.ranking import auroc

CLASSES, EACH, CONTEXT, VOCABULARY = 4, 40, 6, 60


def world(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of four colours with noise, captions of a class word among fillers, ids, classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(CLASSES).repeat(EACH)
    colours = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])[classes]
    noise = torch.randint(0, 40, (len(classes), 3, 32, 32), generator=generator)
    images = (colours[:, :, None, None] + noise).to(torch.uint8)
    tokens = torch.randint(20, VOCABULARY, (len(classes), CONTEXT), generator=generator)
    tokens[:, 0], tokens[:, 2:4], tokens[:, -1] = 1, (10 + classes)[:, None], 0
    return images, tokens, torch.arange(len(classes)), classes


def text_features(tokens: torch.Tensor, width: int) -> torch.Tensor:
    """What a text tower that knows the classes makes of captions."""
    return F.normalize(F.one_hot(tokens[:, 2] - 10, width).float() + 0.1, dim=1)


def neighbours_of(images: torch.Tensor, tokens: torch.Tensor, ids: torch.Tensor, features: torch.Tensor) -> Neighbours:
    neighbours = Neighbours(len(ids), features.shape[1], CONTEXT, VOCABULARY, neighbours=8, seed=0)
    neighbours.fit(raw_descriptors(images), tokens)
    everyone = torch.ones(len(ids), dtype=torch.bool)
    neighbours.enqueue(
        raw_descriptors(images), features, text_features(tokens, features.shape[1]), tokens, ids, everyone
    )
    return neighbours


def test_caption_of_another_class_agrees_less_by_descriptor_and_by_image_feature():
    images, tokens, ids, classes = world()
    wrong = torch.arange(0, len(ids), 10)
    tokens[wrong, 2:4] = (10 + (classes[wrong] + 1) % CLASSES)[:, None]
    torch.manual_seed(0)
    features = F.normalize(F.one_hot(classes).float() + 0.3 * torch.randn(len(ids), CLASSES), dim=1)
    neighbours = neighbours_of(images, tokens, ids, features)
    honest = torch.ones(len(ids), dtype=torch.bool)
    honest[wrong] = False
    for support in (neighbours.by_descriptor(raw_descriptors(images), ids), neighbours.by_image_feature(features, ids)):
        chosen = neighbours.representative(support)
        for agreement in (
            neighbours.bag_of_words_agreement(support, tokens),
            neighbours.text_agreement(support, text_features(tokens, CLASSES)),
        ):
            assert auroc(-agreement.numpy(), ~honest.numpy()) > 0.75
        assert (classes[chosen] == classes).float().mean() > 0.9
        assert (neighbours.tokens[chosen, 3] == 10 + classes).float().mean() > 0.85


def test_copies_of_an_image_are_not_its_neighbours():
    images, tokens, ids, classes = world()
    copies = torch.nonzero(classes == 0).flatten()[:10]
    images[copies] = images[copies[0]].clone()
    tokens[copies, 2:4] = 11
    neighbours = neighbours_of(images, tokens, ids, torch.zeros(len(ids), 4))
    support = neighbours.by_descriptor(raw_descriptors(images[copies]), ids[copies])
    assert not torch.isin(support.slots[support.usable], copies).any()
    assert not torch.isin(neighbours.representative(support), copies).any()
    assert (neighbours.bag_of_words_agreement(support, tokens[copies]) < 0.9).all()


def test_an_image_is_not_its_own_neighbour():
    images, tokens, ids, _ = world()
    neighbours = neighbours_of(images, tokens, ids, torch.zeros(len(ids), 4))
    assert (
        neighbours.ids[neighbours.representative(neighbours.by_descriptor(raw_descriptors(images), ids))] != ids
    ).all()


def test_ring_keeps_the_newest_valid_pairs_in_order():
    images, tokens, ids, _ = world()
    neighbours = Neighbours(10, 4, CONTEXT, VOCABULARY, neighbours=2, seed=0)
    neighbours.fit(raw_descriptors(images), tokens)
    for start in range(0, 28, 7):
        rows = slice(start, start + 7)
        valid = ids[rows] % 5 != 0
        nothing = torch.zeros(7, 4)
        neighbours.enqueue(raw_descriptors(images[rows]), nothing, nothing, tokens[rows], ids[rows], valid)
    kept = [i for i in range(28) if i % 5][-10:]
    assert sorted(neighbours.ids.tolist()) == kept
    assert neighbours.ids.roll(-neighbours.cursor).tolist() == kept


def test_restored_state_finds_the_same_neighbours():
    images, tokens, ids, _ = world()
    first = neighbours_of(images, tokens, ids, torch.rand(len(ids), 4))
    second = Neighbours(len(ids), 4, CONTEXT, VOCABULARY, neighbours=8, seed=0)
    second.load_state_dict(first.state_dict())
    mine, theirs = (each.by_descriptor(raw_descriptors(images), ids) for each in (first, second))
    assert torch.equal(mine.slots, theirs.slots)
    assert torch.equal(mine.usable, theirs.usable)
    assert torch.equal(first.bag_of_words_agreement(mine, tokens), second.bag_of_words_agreement(theirs, tokens))
    own = text_features(tokens, 4)
    assert torch.equal(first.text_agreement(mine, own), second.text_agreement(theirs, own))


def test_bags_of_words_match_the_tf_idf_cosine():
    _, tokens, _, _ = world()
    bags = BagOfWords(VOCABULARY, width=4096)
    bags.fit(tokens)
    present = torch.zeros(len(tokens), VOCABULARY).scatter_(1, tokens, 1.0)
    frequency = present.sum(dim=0)
    weighted = present * torch.where(frequency >= 3, (len(tokens) / frequency.clamp(min=1)).log(), 0.0)
    reference = F.normalize(weighted, dim=1)
    assert torch.allclose(bags(tokens) @ bags(tokens).T, reference @ reference.T, atol=0.08)


def test_descriptors_span_the_leading_directions():
    images, _, _, _ = world()
    raw = raw_descriptors(images)
    descriptor = ImageDescriptor(widths=(3, 2))
    descriptor.fit(raw)
    for part, directions in (
        (slice(0, PARTS[0]), descriptor.directions[: PARTS[0], :3]),
        (slice(PARTS[0], None), descriptor.directions[PARTS[0] :, 3:]),
    ):
        centred = raw[:, part] - raw[:, part].mean(dim=0)
        left, _, _ = torch.linalg.svd(centred, full_matrices=False)
        mine = F.normalize(centred @ directions, dim=0)
        leading = left[:, : mine.shape[1]]
        assert torch.allclose((leading.T @ mine).square().sum(dim=0), torch.ones(mine.shape[1]), atol=1e-3)
    assert not descriptor.directions[: PARTS[0], 3:].any()


def test_directions_in_which_no_image_differs_count_nothing():
    """Which ones they are is up to rounding: other processors would give other descriptors."""
    images, _, _, _ = world()
    raw = raw_descriptors(images)
    raw = torch.cat([raw, raw[:3].mean(dim=0, keepdim=True).expand(100, -1)])  # few images, so few directions
    descriptor = ImageDescriptor(widths=(32, 64))
    descriptor.fit(raw[[0, 1, 2, *range(len(images), len(raw))]])
    used = (descriptor.directions != 0).any(dim=0)
    assert 0 < used.sum() <= 2 * 2
    assert descriptor.directions.abs().max() < 1e-6**-0.25
    assert torch.isfinite(descriptor(raw)).all()


def test_descriptors_tell_edges_apart_whatever_the_colours_and_a_small_patch_changes_little():
    generator = torch.Generator().manual_seed(0)
    across = torch.arange(32) % 16 < 8
    images = torch.stack([across.expand(32, 32) if n % 2 else across[:, None].expand(32, 32) for n in range(80)])
    colours = torch.randint(0, 100, (80, 3, 1, 1), generator=generator)
    images = (colours + 120 * images[:, None]).to(torch.uint8)
    descriptor = ImageDescriptor(widths=(4, 4))
    descriptor.fit(raw_descriptors(images))
    clean = descriptor(raw_descriptors(images))
    images[:, :, 20:24, 9:13] = 255
    patched = descriptor(raw_descriptors(images))
    assert ((clean * patched).sum(dim=1) > 0.7).all()
    for described in (clean, patched):
        alike, unlike = described[::2] @ clean[::2].T, described[::2] @ clean[1::2].T
        assert alike.mean() > unlike.mean() + 0.4


def test_copies_have_one_image_hash():
    images, _, _, _ = world()
    images[7] = images[3]
    numbers = image_hashes(images)
    assert numbers[7] == numbers[3]
    assert len(numbers.unique()) == len(images) - 1
