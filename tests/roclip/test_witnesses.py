import torch
import torch.nn.functional as F

from roclip.compare import auroc
from roclip.looks import Looks, thumbnails
from roclip.witnesses import Witnesses
from roclip.words import Words

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


def witnesses_of(images: torch.Tensor, tokens: torch.Tensor, ids: torch.Tensor, features: torch.Tensor) -> Witnesses:
    witnesses = Witnesses(len(ids), features.shape[1], CONTEXT, VOCABULARY, neighbours=8, seed=0)
    witnesses.fit(thumbnails(images), tokens)
    witnesses.enqueue(thumbnails(images), features, tokens, ids, torch.ones(len(ids), dtype=torch.bool))
    return witnesses


def test_caption_of_another_class_agrees_less_by_look_and_by_feature():
    images, tokens, ids, classes = world()
    wrong = torch.arange(0, len(ids), 10)
    tokens[wrong, 2:4] = (10 + (classes[wrong] + 1) % CLASSES)[:, None]
    torch.manual_seed(0)
    features = F.normalize(F.one_hot(classes).float() + 0.3 * torch.randn(len(ids), CLASSES), dim=1)
    witnesses = witnesses_of(images, tokens, ids, features)
    honest = torch.ones(len(ids), dtype=torch.bool)
    honest[wrong] = False
    for heard in (witnesses.by_look(thumbnails(images), tokens, ids), witnesses.by_feature(features, tokens, ids)):
        assert auroc(-heard.agreement.numpy(), ~honest.numpy()) > 0.75
        assert (classes[heard.slots] == classes).float().mean() > 0.9
        assert (witnesses.tokens[heard.slots, 3] == 10 + classes).float().mean() > 0.85


def test_copies_of_an_image_are_no_witnesses_for_it():
    images, tokens, ids, classes = world()
    copies = torch.nonzero(classes == 0).flatten()[:10]
    images[copies] = images[copies[0]].clone()
    tokens[copies, 2:4] = 11
    witnesses = witnesses_of(images, tokens, ids, torch.zeros(len(ids), 4))
    heard = witnesses.by_look(thumbnails(images[copies]), tokens[copies], ids[copies])
    assert not torch.isin(heard.slots, copies).any()
    assert (heard.agreement < 0.9).all()


def test_nobody_is_a_witness_of_oneself():
    images, tokens, ids, _ = world()
    witnesses = witnesses_of(images, tokens, ids, torch.zeros(len(ids), 4))
    assert (witnesses.ids[witnesses.by_look(thumbnails(images), tokens, ids).slots] != ids).all()


def test_ring_keeps_the_newest_valid_pairs_in_order():
    images, tokens, ids, _ = world()
    witnesses = Witnesses(10, 4, CONTEXT, VOCABULARY, neighbours=2, seed=0)
    witnesses.fit(thumbnails(images), tokens)
    for start in range(0, 28, 7):
        rows = slice(start, start + 7)
        valid = ids[rows] % 5 != 0
        witnesses.enqueue(thumbnails(images[rows]), torch.zeros(7, 4), tokens[rows], ids[rows], valid)
    kept = [i for i in range(28) if i % 5][-10:]
    assert sorted(witnesses.ids.tolist()) == kept
    assert witnesses.ids.roll(-witnesses.cursor).tolist() == kept


def test_state_gives_the_same_testimony():
    images, tokens, ids, _ = world()
    first = witnesses_of(images, tokens, ids, torch.rand(len(ids), 4))
    second = Witnesses(len(ids), 4, CONTEXT, VOCABULARY, neighbours=8, seed=0)
    second.load_state_dict(first.state_dict())
    mine, theirs = (w.by_look(thumbnails(images), tokens, ids) for w in (first, second))
    assert torch.equal(mine.agreement, theirs.agreement)
    assert torch.equal(mine.slots, theirs.slots)


def test_words_match_the_tf_idf_cosine():
    _, tokens, _, _ = world()
    words = Words(VOCABULARY, width=4096)
    words.fit(tokens)
    present = torch.zeros(len(tokens), VOCABULARY).scatter_(1, tokens, 1.0)
    frequency = present.sum(dim=0)
    weighted = present * torch.where(frequency >= 3, (len(tokens) / frequency.clamp(min=1)).log(), 0.0)
    reference = F.normalize(weighted, dim=1)
    assert torch.allclose(words(tokens) @ words(tokens).T, reference @ reference.T, atol=0.08)


def test_looks_span_the_leading_directions():
    images, _, _, _ = world()
    small = thumbnails(images)
    looks = Looks(width=3)
    looks.fit(small)
    left, _, _ = torch.linalg.svd(small - small.mean(dim=0), full_matrices=False)
    mine = F.normalize((small - looks.mean) @ looks.directions, dim=0)
    assert torch.allclose((left[:, :3].T @ mine).pow(2).sum(dim=0), torch.ones(3), atol=1e-3)
