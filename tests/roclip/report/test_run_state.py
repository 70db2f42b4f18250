"""A run directory read while it grows: each line once, no extreme lost, little memory; what to do next."""

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import scene_samples, write_shard

from cluster.dashboard.next_steps import next_steps
from cluster.ingest.report import IngestPage
from roclip.config import dump_config, load_config
from roclip.data.shards import Manifest
from roclip.metrics.registry import MetricsWriter
from roclip.report.charts import chart, rank_columns
from roclip.report.curves import Curve
from roclip.report.ingest_progress import IngestProgress
from roclip.report.ingest_state import IngestReader
from roclip.report.oracle_state import PngStore
from roclip.report.run_state import RunReader, RunState
from roclip.report.thinning import Thinned
from roclip.report.training_state import TrainingReader, TrainingState
from roclip.report.watched_files import LINE_BYTES, Tail, WatchedFiles
from roclip.storage import write_atomic

ROW = {"epochs": 4, "phase": "plain", "samples_seen": 64, "samples_per_s": 100.0, "eta_s": 30.0, "data_wait_frac": 0.05}


def row(step: int, **changed: object) -> dict:
    return {"step": step, "epoch": 1 + step // 10, "progress": step / 10, "loss": 1.0, **ROW, **changed}


def run_of(folder: Path, *rows: dict) -> Path:
    """A run directory of one arm with these steps."""
    preset = folder / "preset.yaml"
    preset.write_text("name: small\narms: [roclip]\ndata: {scenes: 100}\ntrain: {epochs: 4}\n")
    run = folder / "run"
    (run / "roclip").mkdir(parents=True)
    write_atomic(run / "config.yaml", dump_config(load_config(preset, [f"run_dir={run}"])))
    writer = MetricsWriter(run / "roclip" / "metrics.jsonl")
    for logged in rows:
        writer.write(logged)
    return run


def state_of(run: Path) -> RunState:
    return RunReader(run, PngStore()).read()


def advice(run: Path, disk_free_frac: float = 0.5) -> str:
    """What next steps say of a run on a disk of which so much is free, however full this machine's is."""
    state = replace(state_of(run), disk_free_frac=disk_free_frac)
    return "\n".join(f"{step.tone}: {step.title}. {step.text} {step.command}" for step in next_steps(state))


# ---- reading ------------------------------------------------------------------------------------------------


def test_tail_reads_each_line_once_and_a_half_one_when_it_is_whole(tmp_path):
    tail, begun = Tail(tmp_path / "log"), []
    assert list(tail.read(lambda: begun.append(1))) == []
    with (tmp_path / "log").open("w") as file:
        file.write('{"a": 1}\n{"a": 2}\n{"a"')
        file.flush()
        assert [line["a"] for line in tail.read(lambda: begun.append(1))] == [1, 2]
        file.write(": 3}\n")
        file.flush()
        assert [line["a"] for line in tail.read(lambda: begun.append(1))] == [3]
    assert len(begun) == 1
    write_atomic(tmp_path / "log", '{"a": 9}\n{"a": 8}\n{"a": 7}\n')  # as a resume writes it anew, no shorter
    assert [line["a"] for line in tail.read(lambda: begun.append(1))] == [9, 8, 7]
    assert len(begun) == 2
    (tmp_path / "log").unlink()
    assert list(tail.read(lambda: begun.append(1))) == []
    assert len(begun) == 3


def test_tail_takes_a_long_log_in_pieces_and_passes_over_what_is_no_row(tmp_path):
    lines = [json.dumps({"a": n}) for n in range(1000)]
    lines[500:500] = ["no json", "x" * (2 * LINE_BYTES + 10), "[1]"]
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    tail, read, looks = Tail(tmp_path / "log", most_bytes=1000), [], 0
    while looks == 0 or tail.share_read < 1:
        read += [line["a"] for line in tail.read(lambda: None)]
        looks += 1
    assert read == list(range(1000))
    assert looks > 10
    assert tail.bad_lines == 5  # the long one in three pieces


def test_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    files, reads = WatchedFiles(tmp_path), []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read(path))
    write_atomic(tmp_path / "a.json", '{"a": 1}')
    assert [files.table("a.json") for _ in range(5)] == [{"a": 1}] * 5
    assert len(reads) == 1
    (tmp_path / "a.json").write_text("{")
    assert files.table("a.json") == {"a": 1}  # what it said before stands
    assert "a.json" in files.unreadable
    write_atomic(tmp_path / "a.json", '{"a": 2}')
    assert files.table("a.json") == {"a": 2}
    assert files.unreadable == {}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(2, 30))
def test_thinned_curve_keeps_extremes_and_stays_small(values, limit):
    curve = Thinned(limit)
    for x, y in enumerate(values):
        curve.add(x, y)
    reach = curve.reach or [(y, y) for _, y in curve.means]
    assert len(curve.means) <= 2 * limit
    assert min(low for low, _ in reach) == min(values)
    assert max(high for _, high in reach) == max(values)
    assert curve.means[-1][0] == len(values) - 1
    assert all(low - 1e-6 <= mean <= high + 1e-6 for (_, mean), (low, high) in zip(curve.means, reach, strict=True))


def test_spike_in_a_long_log_is_seen_and_memory_does_not_grow(tmp_path):
    path = tmp_path / "roclip" / "metrics.jsonl"
    path.parent.mkdir()
    with path.open("w") as file:
        for step in range(30_000):
            loss, phase = 50.0 if step == 12_345 else 1.0, "matched" if step % 7 < 3 else "plain"
            file.write(json.dumps(row(step, loss=loss, phase=phase)) + "\n")
    reader = TrainingReader(WatchedFiles(tmp_path), "roclip")
    state = reader.read()
    while reader.behind:
        state = reader.read()
    loss = state.curves["loss"]
    assert state.row["step"] == 29_999
    assert len(loss.means) <= 400
    assert max(high for _, high in loss.reach) == 50.0
    assert len(state.matched) <= 400
    assert state.matched[-1][1] <= 3000


def test_second_read_of_a_run_reads_only_what_is_new(tmp_path):
    run = run_of(tmp_path, *(row(step) for step in range(1, 2001)))
    reader = RunReader(run, PngStore())
    reader.read_all()
    first_bytes = reader.files.bytes_read
    assert first_bytes >= (run / "roclip" / "metrics.jsonl").stat().st_size
    reader.read_all()
    assert reader.files.bytes_read == first_bytes
    line = json.dumps(row(2001)) + "\n"
    with (run / "roclip" / "metrics.jsonl").open("a") as file:
        file.write(line)
    assert reader.read_all().trainings[0].row["step"] == 2001
    assert reader.files.bytes_read == first_bytes + len(line)


def test_sums_newest_values_and_checkpoints_are_counted_as_the_files_grow(tmp_path):
    run = run_of(tmp_path, row(1, cache_hits=3, loss=2.0), row(2, cache_hits=4, loss=float("nan")))
    saves = run / "roclip" / "checkpoints" / "saves.jsonl"
    saves.parent.mkdir()
    saves.write_text('{"step": 1, "copied": false}\n{"step": 2, "copied": null}\n')
    reader = TrainingReader(WatchedFiles(run), "roclip")
    training = reader.read()
    assert training.totals["cache_hits"] == 7
    assert math.isnan(training.newest["loss"])
    assert "loss" not in training.row
    assert (training.checkpoints.count, training.checkpoints.failed_copies) == (2, 1)
    assert (training.checkpoints.last["step"], training.checkpoints.last_copied["step"]) == (2, 1)
    MetricsWriter(run / "roclip" / "metrics.jsonl", 1).write(row(2, cache_hits=1))
    with saves.open("a") as file:
        file.write('{"step": 3, "copied": true}\n')
    training = reader.read()
    assert training.totals["cache_hits"] == 4
    assert training.newest["loss"] == 1.0
    assert (training.checkpoints.count, training.checkpoints.last_copied["step"]) == (3, 3)


def test_matched_stretches_reach_from_step_to_step(tmp_path):
    phases = ["plain", "plain", "matched", "matched", "plain", "matched"]
    run = run_of(tmp_path, *(row(step + 1, phase=phase) for step, phase in enumerate(phases)))
    assert state_of(run).trainings[0].matched == ((0.2, 0.4), (0.5, 0.6))


def test_resume_takes_back_what_came_after_the_checkpoint(tmp_path):
    run = run_of(tmp_path, row(1), row(2), row(3, loss=9.0))
    reader = RunReader(run, PngStore())
    assert reader.read().trainings[0].curves["loss"].last == 9.0
    MetricsWriter(run / "roclip" / "metrics.jsonl", 2)
    assert reader.read().trainings[0].row["step"] == 2
    assert [y for _, y in reader.read().trainings[0].curves["loss"].means] == [1.0, 1.0]


def test_ingest_is_counted_from_the_manifest_between_the_lines_of_its_log(tmp_path):
    shards, reader = tmp_path / "shards", IngestReader(WatchedFiles(tmp_path))
    assert reader.read(shards) is None
    page = IngestPage(tmp_path / "ingest", shards, "list")
    write_shard(shards, 0, scene_samples(0, 8))
    page.show(IngestProgress(8, 40, 8, {"http_404": 1}, 1, 5, 20.0, 60.0))
    now = reader.read(shards)
    assert now is not None
    assert (now.done_urls, now.total_urls, now.shards, now.total_shards, now.ended) == (8, 40, 1, 5, False)
    assert now.ends_s is not None
    assert 50 < now.ends_s - time.time() < 61
    write_shard(shards, 1, scene_samples(8, 8))  # sealed, and the log is silent
    now = reader.read(shards)
    assert now is not None
    assert (now.done_urls, now.succeeded, now.shards) == (16, 16, 2)
    Manifest(shards).finish({"urls": 18, "succeeded": 16, "failed": {"timeout": 2}, "shards": 2})
    now = reader.read(shards)
    assert now is not None
    assert (now.done_urls, now.total_urls, now.failed, now.ended, now.ends_s) == (18, 18, {"timeout": 2}, True, None)


def test_store_is_not_asked_for_shards(tmp_path):
    run = run_of(tmp_path, row(1))
    config = load_config(run / "config.yaml", ["data.scenes=0", "data.shards=s3://nowhere.invalid/shards"])
    write_atomic(run / "config.yaml", dump_config(config))
    state = state_of(run)
    assert state.trainings[0].row["step"] == 1
    assert state.ingest is None


# ---- what it means ------------------------------------------------------------------------------------------


def test_stages_follow_a_run(tmp_path):
    run = run_of(tmp_path)
    write_atomic(run / "cost.json", '{"wall_s": 3.0}')
    assert [(stage.title, stage.status) for stage in state_of(run).stages] == [
        ("ingest", "running"),
        ("roclip", "waiting"),
        ("check of roclip", "waiting"),
    ]
    MetricsWriter(run / "roclip" / "metrics.jsonl").write(row(10))
    stage = state_of(run).stages[1]
    assert (stage.status, stage.share) == ("running", 0.25)
    assert stage.ends_s is not None
    assert 20 < stage.ends_s - time.time() <= 30
    MetricsWriter(run / "roclip" / "metrics.jsonl", 10).write(row(40))
    write_atomic(run / "roclip" / "oracle" / "progress.json", '[1, 4, "training the oracle"]')
    done, checked = state_of(run).stages[1:]
    assert done.status == "done"
    assert (checked.status, checked.share, checked.text) == ("running", 0.25, "training the oracle")


def test_healthy_run_needs_nothing(tmp_path):
    assert advice(run_of(tmp_path, row(10))) == ""


def test_disk_that_fills_is_told(tmp_path):
    run = run_of(tmp_path, row(10))
    assert 0 < state_of(run).disk_free_frac < 1
    assert advice(run, disk_free_frac=0.049).startswith("warn: The disk is nearly full. 4.9 % of it is free.")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data_wait_frac": 0.5}, "warn: roclip waits for its data. 50 % of a step's time."),
        ({}, ""),
    ],
)
def test_training_that_waits_for_data_is_told_what_helps(tmp_path, change, said):
    assert said in advice(run_of(tmp_path, row(10, **change)))


def test_rank_that_died_is_told_until_ranks_start_again(tmp_path):
    run = run_of(tmp_path, row(10))
    write_atomic(run / "roclip" / "failure.txt", "rank 1 died")
    log = "2026-01-01 00:00:00 2 ranks from step 0\n2026-01-01 00:01:00 rank 1 died; restart 1 of 2\n"
    write_atomic(run / "roclip" / "log" / "ranks.log", log)
    assert "warn: roclip lost a rank. rank 1 died. It starts again from the beginning." in advice(run)
    write_atomic(run / "roclip" / "log" / "ranks.log", log + "2026-01-01 00:01:30 2 ranks from step 6 (two nodes)\n")
    assert advice(run) == ""
    training: TrainingState = state_of(run).trainings[0]
    assert (training.ranks, training.restarts) == (2, 1)


def test_left_out_steps_and_a_poor_list_are_told(tmp_path):
    run = run_of(tmp_path, row(10))
    write_atomic(
        run / "roclip" / "diverged.json", '[{"step": 7, "why": "loss not finite", "done": "skip", "samples": []}]'
    )
    Manifest(run / "shards").finish(
        {"urls": 100, "succeeded": 20, "failed": {"no_host": 70, "http_404": 10}, "shards": 1}
    )
    said = advice(run)
    assert "roclip left out 1 steps. The last: step 7: loss not finite" in said
    assert "Only 20 % of the URLs gave a pair. Most often: no_host (the name has no address)" in said


@pytest.mark.parametrize(
    ("report", "files", "said"),
    [
        ({"verdict": "poisoned", "target_labels": ["ball"]}, {}, "bad: roclip is poisoned. Towards ball;"),
        ({"verdict": "suspicious"}, {}, "warn: roclip is suspicious."),
        ({"verdict": "inconclusive", "labels": [{"label": "tree", "status": "unchecked"}]}, {}, "cannot check tree"),
        (
            {"verdict": "clean"},
            {"roclip/checkpoints/TRUSTED": "step-1"},
            "good: roclip is clean. step-1 may leave the run.",
        ),
        (
            {"verdict": "poisoned"},
            {"roclip/checkpoints/TRUSTED": "repaired-1"},
            "good: roclip is repaired, and trusted.",
        ),
        (
            {"verdict": "poisoned"},
            {"roclip/repair/repair.json": '{"accepted": false, "reasons": ["Too little is left."]}'},
            "bad: The repair of roclip is not good enough. Too little is left.",
        ),
    ],
)
def test_verdicts_lead_to_the_next_command(tmp_path, report, files, said):
    run = run_of(tmp_path, row(40))
    for name, content in {"roclip/oracle/report.json": json.dumps(report), **files}.items():
        write_atomic(run / name, content)
    assert said in advice(run)


def test_silent_run_is_stopped_and_a_summary_ends_it(tmp_path):
    run = run_of(tmp_path, row(40))
    write_atomic(run / "roclip" / "oracle" / "report.json", '{"verdict": "clean"}')
    Manifest(run / "shards").finish({"urls": 100, "succeeded": 100, "shards": 1})
    hour_ago = time.time() - 3600
    for path in (path for path in run.rglob("*") if path.is_file()):
        os.utime(path, (hour_ago, hour_ago))
    os.utime(run / "shards" / "manifest", (hour_ago, hour_ago))
    assert state_of(run).status == "stopped"
    write_atomic(run / "summary.json", '{"arms": {}}')
    assert state_of(run).status == "finished"


# ---- drawing ------------------------------------------------------------------------------------------------


def test_chart_leaves_a_gap_where_nothing_was_logged():
    points = [(n / 10, 1.0) for n in range(10)] + [(5 + n / 10, 2.0) for n in range(10)]
    svg = chart([Curve("var(--arm0)", points)], [(5.0, 6.0)], share=False, until=8)
    assert svg.count('class="line"') == 2
    assert svg.count('class="shade"') == 1
    assert 'data-x="0 8"' in svg
    assert "style" not in svg


@pytest.mark.parametrize("values", [[0.0], [5.0], [-3.0, -3.0], [1e-9, 2e-9], [1e12, 3e12], [0.0, 0.0]])
@pytest.mark.parametrize("share", [True, False])
def test_chart_of_any_range_can_be_drawn(values, share):
    svg = chart([Curve("red", list(enumerate(values)))], share=share)
    assert "nan" not in svg
    assert "inf" not in svg
    assert svg.count("<text") >= 2


def test_slow_rank_stands_out_also_among_a_thousand():
    times = [0.5] * 1024
    times[700] = 0.9
    svg = rank_columns(times, times)
    assert svg.count("<rect") == 64
    assert svg.count('class="late"') == 1


def test_old_config_names_its_new_keys_and_the_rest_of_the_run_is_read(tmp_path: Path):
    run = run_of(tmp_path, row(1), row(2))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("\n  neighbours: ", "\n  witnesses: "))
    state = state_of(run)
    assert state.config is None
    assert "pool.witnesses is called pool.neighbours now." in state.unreadable["config.yaml"]
    assert [(training.name, training.row["step"]) for training in state.trainings] == [("roclip", 2)]
