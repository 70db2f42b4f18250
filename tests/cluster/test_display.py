import json

from cluster.display import Display
from cluster.train.restarts import note
from roclip.report.ingest_progress import IngestProgress
from roclip.report.training_state import LOG

STEP = {
    "step": 7,
    "epoch": 2,
    "epochs": 4,
    "progress": 1.5,
    "phase": "matched",
    "loss": 1.25,
    "logit_scale": 14.0,
    "samples_per_s": 300.0,
    "epoch_shards": 3,
    "data_wait_frac": 0.02,
    "eta_s": 65.0,
}


def test_progress_is_lines_where_there_is_no_terminal(capsys):
    with Display() as display:
        for shards in (1, 2, 3):
            failed = {"http_404": 4 * shards, "timeout": shards}
            display.ingest(IngestProgress(100 * shards, 300, 95 * shards, failed, shards, 3, 41.5, 65.0))
    first, last = capsys.readouterr().out.splitlines()
    assert "100/300 URLs  1/3 shards  42 images/s  95.0% usable (http_404 4, timeout 1)  65 s left" in first
    assert last.endswith("300/300 URLs  3/3 shards  42 images/s  95.0% usable (http_404 12, timeout 3)")


def test_following_a_training_shows_its_last_step(capsys, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    with Display() as display, display.follow_training("roclip", tmp_path, 4):
        metrics.write_text(
            json.dumps(STEP) + "\n" + json.dumps({**STEP, "progress": 4.0, "epoch": 4}) + "\n{unfinished"
        )
    said = capsys.readouterr().out
    assert "epoch 4/4 matched of 3 shards  step 7  loss 1.250  scale 14.0  300 samples/s, 2% of it waiting" in said
    assert "65 s left" in said


def test_following_a_training_says_once_what_befalls_its_ranks(capsys, tmp_path):
    note(tmp_path, "2 ranks from step 0")
    with Display() as display, display.follow_training("roclip", tmp_path, 4):
        note(tmp_path, "rank 1 died; restart 1 of 2")
        note(tmp_path, "1 ranks from step 8")
        with (tmp_path / LOG).open("a") as file:
            file.write("2000-01-01 00:00:00 unfinished")
    said = capsys.readouterr().out
    assert said.splitlines() == ["roclip   rank 1 died; restart 1 of 2", "roclip   1 ranks from step 8"]


def test_following_a_task_shows_what_it_writes_of_its_progress(capsys, tmp_path):
    progress = tmp_path / "progress.json"
    with Display() as display, display.follow_task("oracle", progress):
        pass
    assert capsys.readouterr().out == ""
    with Display() as display, display.follow_task("oracle", progress):
        progress.write_text(json.dumps([3, 15, "segmenter: epoch 3 of 15"]))
    assert capsys.readouterr().out == "oracle    20%  segmenter: epoch 3 of 15\n"
