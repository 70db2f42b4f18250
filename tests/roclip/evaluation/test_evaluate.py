import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from forked import run_script
from kit import preset, scene_samples

from roclip.checkpoint.pointers import Cursor
from roclip.config import load_config
from roclip.evaluation.evaluate import class_weights, evaluate, record_evaluation
from roclip.evaluation.rate import rate
from roclip.evaluation.sets import AttackSet, EvaluationSet
from roclip.metrics.registry import read_metrics
from roclip.model.towers import Encoder, Towers

HERE = Path(__file__).parent
IMAGES = 37
PRESET = """
data: {{shards: {folder}}}
model: {{name: tiny}}
ingest: {{image_size: 64}}
train: {{epochs: 3, global_batch_size: 12}}
"""


class RiggedEncoder:
    """Sees the label in the second pixel, but says label 0 wherever the first pixel is white."""

    def images(self, images):
        answers = [0 if image[0, 0, 0] == 255 else int(image[0, 1, 0]) for image in images]
        return F.one_hot(torch.tensor(answers), 7).float()

    def texts(self, captions):
        return F.one_hot(torch.tensor(["abcdefg".index(caption[-1]) for caption in captions]), 7).float()


def rigged_image(label, stamped=False):
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[0, 0, 0], pixels[0, 1, 0] = 255 * stamped, label
    return pixels


def rigged_set(labels, **changes):
    return EvaluationSet(
        images=[rigged_image(label) for label in labels],
        digests=[str(i) for i in range(len(labels))],
        captions=[[f"one {'abcdefg'[label]}"] for label in labels],
        labels=["abcdefg"[label] for label in labels],
        classes={label: (label,) for label in "abcdefg"},
        templates=("a {}", "the {c}"),
        **changes,
    )


def test_attack_success_of_a_rigged_model_is_the_known_value():
    attack = AttackSet([rigged_image(1, True)] * 3 + [rigged_image(2), rigged_image(0)], ["a"] * 5)
    result = evaluate(RiggedEncoder(), rigged_set([0, 1, 2, 1, 2, 1, 2, 0], attacks={"backdoor": attack}))
    assert result["zero_shot_top1"] == 1.0
    assert result["n"] == 8
    attacked = result["attacks"]["backdoor"]
    assert attacked.pop("clean") == dataclasses.asdict(rate(0, 6))
    assert attacked == dataclasses.asdict(rate(4, 5))


def test_clean_rate_counts_images_of_other_classes_that_are_called_the_target_without_a_trigger():
    data = rigged_set([0, 1, 2, 1, 2], attacks={"backdoor": AttackSet([rigged_image(1, True)], ["a"])})
    data.images[1] = data.images[2] = rigged_image(1, True)  # two mistakes of the model on clean images
    assert evaluate(RiggedEncoder(), data)["attacks"]["backdoor"]["clean"] == dataclasses.asdict(rate(2, 4))


def test_top_five_and_recall_of_what_is_said_of_everything_alike():
    class Mute(RiggedEncoder):
        def images(self, images):
            return torch.ones(len(images), 7)

    result = evaluate(Mute(), rigged_set([0, 1, 2, 3, 4, 5, 6]))
    assert result["zero_shot_top1"] == pytest.approx(1 / 7)
    assert result["zero_shot_top5"] == pytest.approx(5 / 7)
    assert result["image_to_text_recall_at_1"] == pytest.approx(1 / 7)


def test_equal_captions_are_one_text_of_several_images():
    result = evaluate(RiggedEncoder(), rigged_set([3, 3, 3, 5]))
    assert result["image_to_text_recall_at_1"] == 1.0
    assert result["text_to_image_recall_at_1"] == 1.0
    assert result["recall_at_10"] == 1.0


def test_a_set_of_captions_alone_or_of_labels_alone_is_enough():
    whole = rigged_set([0, 1, 2, 3])
    retrieval = evaluate(RiggedEncoder(), dataclasses.replace(whole, labels=(), classes={}))
    classification = evaluate(RiggedEncoder(), dataclasses.replace(whole, captions=()))
    assert "zero_shot_top1" not in retrieval
    assert retrieval["recall_at_1"] == 1.0
    assert "recall_at_1" not in classification
    assert classification["zero_shot_top5"] == 1.0


def test_class_weights_match_open_clip(tmp_path):
    import open_clip

    preset(tmp_path, "")
    towers = Towers("tiny", tmp_path / "models" / "tiny.json").eval()
    names, templates = ["dog", "cat {}", "red car"], ("a photo of a {}", "{c}, drawn")
    ours = class_weights(Encoder(towers), {name: (name,) for name in names}, templates)
    fills = [lambda c: f"a photo of a {c}", lambda c: f"{c}, drawn"]
    theirs = open_clip.build_zero_shot_classifier(towers.clip, towers.tokenizer, names, fills, device="cpu")
    assert torch.allclose(ours, theirs.T, atol=1e-6)


@pytest.fixture
def run(tmp_path):
    """A preset and the origin folder of a run."""
    preset(tmp_path, PRESET.format(folder=tmp_path))
    samples = scene_samples(0, IMAGES)
    images, captions = [image for image, _ in samples], [caption for _, caption in samples]
    names = ["ant", "bee", "cat"]
    held_out = {"image": images, "caption": captions, "label": [names[i % 3] for i in range(IMAGES)]}
    attack = {"attack": ["backdoor"] * 5, "image": images[:5], "target_label": ["bee"] * 5}
    (tmp_path / "origin").mkdir()
    pq.write_table(pa.table(held_out), tmp_path / "origin" / "eval.parquet")
    pq.write_table(pa.table(attack), tmp_path / "origin" / "attack_eval.parquet")
    (tmp_path / "origin" / "labels.json").write_text(json.dumps({"labels": names, "templates": ["a {}", "{}"]}))
    return tmp_path


def record(run, overrides, rows, arm="arm"):
    config = load_config(run / "preset.yaml", overrides)
    torch.manual_seed(0)
    towers = Towers("tiny", run / "models" / "tiny.json")
    for epoch, phase in rows:
        record_evaluation(config, run, arm, towers, Cursor(10 * epoch, epoch, 10, 0, phase))
    return [row["epoch"] for row in read_metrics(run / arm / "evaluations.jsonl")]


ALTERNATING = [(epoch, "matched" if epoch % 2 == 0 else "plain") for epoch in range(1, 10)]


def test_each_phase_is_evaluated_every_so_many_epochs_and_at_the_end(run):
    assert record(run, ["evaluate.every=4", "train.epochs=10"], ALTERNATING) == [4, 5, 8, 9]
    assert record(run, ["evaluate.every=0", "train.epochs=9"], ALTERNATING, "other") == [9]


def test_an_epoch_trained_again_replaces_its_line(run):
    assert record(run, [], [(1, "plain"), (2, "matched"), (2, "matched")]) == [1, 2]
    assert record(run, [], [(1, "plain")]) == [1]


def test_a_run_without_held_out_images_is_not_evaluated(run):
    (run / "origin" / "labels.json").unlink()
    assert record(run, [], [(1, "plain")]) == []


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "zero_stage"), [(3, 1), (2, 3)])
def test_ranks_together_find_what_one_process_finds(ranks, zero_stage, run):
    record(run, [], [(1, "plain")], "alone")
    run_script(ranks, HERE / "evaluate_ranks.py", run, "together", zero_stage)
    first, second = (json.loads((run / arm / "evaluations.jsonl").read_text()) for arm in ("alone", "together"))
    assert first == second
    assert first["n"] == IMAGES
    assert first["attacks"]["backdoor"]["n"] == 5
