"""Where a repair shows: the plan, the summary, and what tells runs apart."""

import dataclasses
import io

import pytest
from kit import REPOSITORY
from rich.console import Console

from cluster import pipeline
from cluster.cli.main import guarded
from cluster.display import Display
from cluster.oracle.request import OracleRequest
from cluster.ray.session import Session
from cluster.summary import arms_table
from roclip.config import identity, load_config

DEMO = REPOSITORY / "configs" / "demo.yaml"


def test_option_and_setting_plan_a_repair(tmp_path, capsys: pytest.CaptureFixture[str]):
    plain = ["oracle", str(DEMO), f"runs={tmp_path}", "--dry-run", "repair.enabled=false"]
    assert guarded(plain) == 0
    assert "repair what is poisoned" not in capsys.readouterr().out
    assert guarded([*plain[:-1], "--repair"]) == 0
    assert "repair what is poisoned or suspicious on at most 2 % of the images" in capsys.readouterr().out
    assert guarded(["run", *plain[1:4], "repair.enabled=true", "repair.set_frac=0.01"]) == 0
    assert "at most 1 % of the images" in capsys.readouterr().out


def test_repair_makes_no_other_run_and_no_other_verdict():
    config = load_config(DEMO, ["repair.enabled=true", "repair.lr=1e-3"])
    plain = load_config(DEMO, ["repair.enabled=false"])
    assert identity(config) == identity(plain)
    assert config.oracle.of_verdict == plain.oracle.of_verdict
    assert dataclasses.replace(config.oracle, alpha=0.05).of_verdict != plain.oracle.of_verdict


def test_repair_after_a_check_in_this_process_starts_ray_before_it_trains(tmp_path, monkeypatch: pytest.MonkeyPatch):
    done, config = [], load_config(DEMO)

    def repair(config, run, arm, request, *, train, say):
        train(config, arm, run)
        return {"accepted": True, "reasons": []}

    monkeypatch.setattr("cluster.oracle.repair.repair", repair)
    monkeypatch.setattr(pipeline, "train_arm", lambda *_: done.append("trained"))
    monkeypatch.setattr(Session, "need_ray", lambda _: done.append("ray"))
    here = Session(config, tmp_path, Display())
    assert pipeline._repair(here, "clip", OracleRequest(in_process=True)) == {"accepted": True, "reasons": []}
    assert done == ["ray", "trained"]


def test_summary_says_what_came_of_a_repair():
    done = {"accepted": True, "samples": 80, "before": {"attack": 0.96}, "after": {"attack": 0.012}}
    arms = {
        "one": {"oracle": {"verdict": "poisoned", "repair": done}},
        "two": {"oracle": {"verdict": "poisoned", "repair": {**done, "accepted": False}}},
        "three": {"oracle": {"verdict": "poisoned", "repair": {"accepted": False, "samples": 0}}},
        "four": {"oracle": {"verdict": "clean"}},
    }
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(arms_table(arms))
    (row,) = [line for line in console.export_text().splitlines() if "repair" in line]
    for words in ("96.0 % -> 1.2 %, trusted", "96.0 % -> 1.2 %, not trusted", "nothing to repair with", "–"):
        assert words in row
