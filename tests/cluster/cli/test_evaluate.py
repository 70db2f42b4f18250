import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from kit import preset, scene_samples

from cluster.cli.main import guarded
from roclip.config import dump_config, load_config, run_directory
from roclip.model.towers import Towers

PRESET = """
name: small
runs: {folder}/runs
run_dir: {folder}/run
data: {{shards: {folder}/shards}}
ingest: {{image_size: 64}}
model: {{name: tiny}}
"""
LABELS = ["ant", "bee", "cat"]


@pytest.fixture
def small(tmp_path):
    """A preset, a run directory with held-out images, a set of tars and an exported model."""
    preset(tmp_path, PRESET.format(folder=tmp_path))
    samples = scene_samples(0, 24)
    (tmp_path / "run" / "origin").mkdir(parents=True)
    (tmp_path / "set").mkdir()
    columns = {"image": [image for image, _ in samples], "caption": [caption for _, caption in samples]}
    columns["label"] = [LABELS[i % 3] for i in range(24)]
    pq.write_table(pa.table(columns), tmp_path / "run" / "origin" / "eval.parquet")
    (tmp_path / "run" / "origin" / "labels.json").write_text(json.dumps({"labels": LABELS, "templates": ["{}"]}))
    with webdataset.TarWriter(str(tmp_path / "set" / "0.tar")) as sink:
        for i, (image, caption) in enumerate(samples[:20]):
            sink.write({"__key__": f"{i:05d}", "png": image, "cls": str(i % 3), "txt": caption})
    (tmp_path / "set" / "classnames.txt").write_text("\n".join(LABELS))
    torch.manual_seed(0)
    Towers("tiny", tmp_path / "models" / "tiny.json").eval().save(tmp_path / "model")
    return tmp_path


def test_an_exported_model_is_measured_on_the_run_and_on_tars(small, capsys):
    command = ["evaluate", str(small / "preset.yaml"), "--checkpoint", str(small / "model")]
    assert guarded(command) == 0
    shown = capsys.readouterr().out
    assert "zero-shot top-1" in shown
    assert "image to text @1" in shown
    figures = json.loads((small / "run" / "evaluation-model.json").read_text())
    assert figures["n"] == 24
    assert guarded([*command, f"evaluate.webdataset={small / 'set'}"]) == 0
    ours = json.loads((small / "run" / "evaluation-model.json").read_text())
    assert ours["n"] == 20
    assert {"zero_shot_top1", "zero_shot_top5", "linear_probe_top1", "recall_at_10"} < set(ours)


def test_what_is_measured_with_does_not_make_another_run(small):
    """`roclip evaluate PRESET evaluate.webdataset=…` finds the run that the preset alone began."""
    config = load_config(small / "preset.yaml", ["run_dir=''"])
    (small / "runs" / "2026-01-31-small").mkdir(parents=True)
    (small / "runs" / "2026-01-31-small" / "config.yaml").write_text(dump_config(config))
    measured = load_config(small / "preset.yaml", ["run_dir=''", f"evaluate.webdataset={small / 'set'}"])
    assert run_directory(measured).name == "2026-01-31-small"
    assert (
        run_directory(load_config(small / "preset.yaml", ["run_dir=''", "evaluate.size=7"])).name != "2026-01-31-small"
    )


def test_a_folder_without_a_model_and_a_set_without_tars_are_named(small, capsys):
    command = ["evaluate", str(small / "preset.yaml"), "--checkpoint"]
    assert guarded([*command, str(small / "set")]) == 4
    assert guarded([*command, str(small / "model"), f"evaluate.webdataset={small / 'model'}"]) == 3
    assert "expected a folder with *.tar" in " ".join(capsys.readouterr().err.split())
