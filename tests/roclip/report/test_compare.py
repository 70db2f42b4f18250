"""Figures of an experiment against numbers worked out by hand, and the files of its report."""

import html.parser
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from roclip.evaluation.rate import rate
from roclip.report.comparison import comparison, read_training, summarise, worst
from roclip.report.comparison_report import write_comparison
from roclip.report.experiment import Experiment, load_experiment
from roclip.report.frontier import pareto

EPOCHS = 4
PRESET = """
name: two
data: {scenes: 100}
train: {epochs: 4}
seeds: [0, 1]
arms:
  clip: {method: clip}
  "roclip-2": {}
sweep:
  few: {attacks: {backdoors: [{kind: patch, count: 2}]}}
  many: {attacks: {backdoors: [{kind: patch, count: 8}]}}
points: [few, many]
"""
FACTS = {"command": "roclip compare two.yaml", "commits": ["0123456789ab"], "wall_s": 90.0}


def evaluation(epoch: int, phase: str, zero_shot: float, backdoor: int, targeted: int) -> dict:
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "phase": phase,
        "zero_shot_top1": zero_shot,
        "linear_probe_top1": zero_shot + 0.1,
        "recall_at_5": None,
        "n": 100,
        "attacks": {
            "backdoor": {"successes": backdoor, "n": 50, "rate": backdoor / 50, "ci95": [0, 1]},
            "targeted": {"successes": targeted, "n": 16, "rate": targeted / 16, "ci95": [0, 1]},
        },
    }


def make_arm(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    path = tmp_path / "two.yaml"
    path.write_text(PRESET)
    return load_experiment(path)


@pytest.fixture
def folder(tmp_path: Path, experiment: Experiment) -> Path:
    """Two points, two seeds, two arms: clip is plain, roclip-2 alternates and saw-tooths."""
    root = tmp_path / "runs"
    for corpus in experiment.corpora:
        origin = root / corpus.name / "origin"
        origin.mkdir(parents=True)
        count, seed = {"few": 2, "many": 8}[corpus.point], corpus.seed
        attacks = ["backdoor"] * count + ["targeted"] * 4
        keys = [f"{row:09d}" for row in range(len(attacks))]
        pq.write_table(pa.table({"key": keys, "attack": attacks}), origin / "poison.parquet")
        pq.write_table(pa.table({"path": [""] * (100 + len(attacks))}), origin / "corpus.parquet")
        harm = 2 if corpus.point == "few" else 4
        make_arm(
            root / corpus.name / "clip",
            [evaluation(epoch, "plain", 0.1 * epoch + 0.1 * seed, 10 * harm, 12) for epoch in range(1, EPOCHS + 1)],
        )
        make_arm(
            root / corpus.name / "roclip-2",
            [
                evaluation(1, "plain", 0.1, 50, 16),
                evaluation(2, "matched", 0.2, 49, 15),
                evaluation(3, "plain", 0.35 + 0.02 * seed, 5 * harm, 1),
                evaluation(4, "matched", 0.3 + 0.1 * seed, harm, 2 + seed),
            ],
        )
    return root


def row(result: dict, point: str, arm: str) -> dict:
    (found,) = [row for row in result["rows"] if (row["point"], row["arm"]) == (point, arm)]
    return found


def test_rows_match_the_evaluations_by_hand(folder, experiment):
    result = comparison(folder, experiment)
    assert result["points"]["few"] == {"pairs": 106, "poisons": {"backdoor": 2, "targeted": 4}}
    clip, ours = row(result, "few", "clip"), row(result, "few", "roclip-2")
    assert clip["seeds"] == [0, 1]
    assert clip["worst"]["zero_shot_top1"]["by_seed"] == pytest.approx([0.4, 0.5])
    assert clip["worst"]["zero_shot_top1"]["mean"] == pytest.approx(0.45)
    assert clip["worst"]["zero_shot_top1"]["std"] == pytest.approx(math.sqrt(2 * 0.05**2))
    assert clip["worst"]["attacks"]["backdoor"]["successes"] == 40
    assert clip["worst"]["attacks"]["backdoor"]["n"] == 100
    assert set(clip["phases"]) == {"plain"}
    # seed 0: matched 0.30, plain 0.35; seed 1: matched 0.40, plain 0.37; attacks: backdoor worse plain, targeted matched
    assert ours["worst"]["zero_shot_top1"]["by_seed"] == pytest.approx([0.3, 0.37])
    assert ours["worst"]["linear_probe_top1"]["mean"] == pytest.approx(0.435)
    assert [seed["successes"] for seed in ours["worst"]["attacks"]["backdoor"]["by_seed"]] == [10, 10]
    assert [seed["successes"] for seed in ours["worst"]["attacks"]["targeted"]["by_seed"]] == [2, 3]
    assert ours["end"]["attacks"]["backdoor"]["successes"] == 4
    assert ours["phases"]["plain"]["attacks"]["targeted"]["successes"] == 2
    assert ours["phases"]["matched"]["zero_shot_top1"]["mean"] == pytest.approx(0.35)
    assert row(result, "many", "clip")["worst"]["attacks"]["backdoor"]["rate"] == pytest.approx(0.8)


def test_wilson_interval_of_pooled_seeds_matches_the_roots_of_its_equation(folder, experiment):
    """The interval's ends are the p with |x/n - p| = z sqrt(p (1 - p) / n), Wilson's own definition."""
    result = row(comparison(folder, experiment), "few", "clip")["worst"]["attacks"]["backdoor"]
    rate, n, z = result["successes"] / result["n"], result["n"], 1.959964
    roots = np.roots([1 + z**2 / n, -(2 * rate + z**2 / n), rate**2])
    assert result["ci95"] == pytest.approx(sorted(roots.real), abs=1e-9)


def test_unfinished_training_is_left_out(folder, experiment):
    path = folder / "few-seed1" / "roclip-2" / "evaluations.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:3]))
    assert read_training(path.parent, EPOCHS) is None
    result = comparison(folder, experiment)
    assert row(result, "few", "roclip-2")["seeds"] == [0]
    assert row(result, "few", "roclip-2")["worst"]["zero_shot_top1"]["std"] is None
    path.unlink()
    (folder / "few-seed0" / "roclip-2" / "evaluations.jsonl").unlink()
    assert [r["arm"] for r in comparison(folder, experiment)["rows"]] == ["clip", "clip", "roclip-2"]


def test_warm_up_phase_of_the_first_half_is_not_judged(tmp_path):
    make_arm(tmp_path / "arm", [evaluation(1, "plain", 0.1, 50, 16), evaluation(4, "matched", 0.5, 0, 0)])
    found = read_training(tmp_path / "arm", EPOCHS)
    assert found is not None
    assert set(found["phases"]) == {"matched"}


def test_worst_takes_each_figure_from_its_own_phase():
    views = [evaluation(3, "plain", 0.5, 1, 9), evaluation(4, "matched", 0.4, 7, 3)]
    figures = worst(views)
    assert figures["zero_shot_top1"] == 0.4
    assert figures["attacks"]["backdoor"]["successes"] == 7
    assert figures["attacks"]["targeted"]["successes"] == 9
    assert "recall_at_5" not in figures
    assert summarise([figures])["attacks"]["targeted"]["by_seed"] == [{"successes": 9, "n": 16, "rate": 9 / 16}]


def test_clean_rates_of_all_seeds_are_pooled_where_all_have_them():
    seed = {"attacks": {"backdoor": {"successes": 3, "n": 10, "clean": {"successes": 1, "n": 40}}}}
    assert summarise([seed, seed])["attacks"]["backdoor"]["clean"] == asdict(rate(2, 80))
    without = {"attacks": {"backdoor": {"successes": 3, "n": 10}}}
    assert "clean" not in summarise([seed, without])["attacks"]["backdoor"]


def test_suspects_are_scored_by_attack_against_the_clean_pairs(folder, experiment):
    run = folder / "few-seed0"
    keys = [f"{n:09d}" for n in range(106)]  # 0 and 1 are backdoor poisons, 2 to 5 targeted ones
    scores = [9.0, 9.0, 0.0, 0.0, 0.0, 0.0, *np.linspace(1, 2, 100)]
    pq.write_table(pa.table({"key": keys, "score": scores}), run / "roclip-2" / "suspects.parquet")
    found = row(comparison(folder, experiment), "few", "roclip-2")["suspects"]
    best = {"auroc": 1.0, "average_precision": 1.0, "fpr_at_tpr_95": 0.0, "fpr_at_tpr_100": 0.0}
    assert found["backdoor"] == best
    assert (found["targeted"]["auroc"], found["targeted"]["fpr_at_tpr_100"]) == (0.0, 1.0)


def test_pareto_keeps_what_nothing_beats():
    assert pareto([(0.9, 0.5), (0.1, 0.4), (0.2, 0.3), (0.1, 0.2), (0.9, 0.45)]) == [(0.1, 0.4), (0.9, 0.5)]
    assert pareto([]) == []


def test_report_has_table_figures_and_page(folder, experiment):
    result = write_comparison(folder, experiment, FACTS)
    assert json.loads((folder / "compare.json").read_text()) == json.loads(json.dumps(result))
    table = (folder / "table.md").read_text()
    assert "`roclip compare two.yaml`, commit 0123456789ab, 1 min 30 s" in table
    assert "- many: 8 backdoor (7.14 %), 4 targeted (3.57 %) among 112 pairs" in table
    assert "| few | clip | 45.0 % | 55.0 % | 40.0 % (40/100, 30.9 to 49.8) |" in table
    assert "| few | roclip-2 | 33.5 % (-11.5) | 43.5 % (-11.5) | 20.0 % (20/100, 13.3 to 28.9) |" in table
    assert "| few | roclip-2 | matched | 35.0 % | 45.0 % | 2/50, 2/50 | 2/16, 3/16 |" in table
    tables = [block.splitlines() for block in table.split("\n\n") if block.startswith("|")]
    assert [{line.count("|") for line in lines} for lines in tables] == [{7}, {8}]
    page = (folder / "compare.html").read_text()
    html.parser.HTMLParser().feed(page)
    assert page.count("<svg") == 2
    assert "http://" not in page
    for stem in ("frontier", "sweep"):
        drawing = (folder / f"{stem}.svg").read_text()
        assert "roclip-2" in drawing
        with Image.open(folder / f"{stem}.png") as picture:
            assert picture.width > 800
