"""`roclip config`: what it prints."""

import pytest
from kit import REPOSITORY

from cluster.cli.main import guarded
from roclip.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert guarded(["config", *arguments]) == 0
    return capsys.readouterr().out


def test_every_key_is_printed_with_type_default_unit_and_docstring(capsys: pytest.CaptureFixture[str]):
    said = printed(capsys)
    assert "  pool.size  int  = 21845  [pairs]\n      Number of pairs in the pool." in said
    assert "  train.precision  fp32 | bf16  = fp32\n" in said
    assert "\n  seed  int  = 0\n" in said
    assert "  deploy.kubernetes.namespace" in said


def test_section_key_and_search_choose(capsys: pytest.CaptureFixture[str]):
    said = printed(capsys, "pool")
    assert "  pool.neighbours  " in said
    assert "train.lr" not in said
    assert "The caption pool and what it is used for" in said
    assert printed(capsys, "train.lr").count("  = ") == 1
    said = printed(capsys, "--search", "LR")
    assert "  train.lr  " in said
    assert "  repair.lr  " in said
    assert "pool.size" not in said


def test_preset_shows_what_it_sets(capsys: pytest.CaptureFixture[str]):
    said = printed(capsys, "--preset", "demo")
    assert "  train.epochs  int  = 14  (default 24)  [epochs]" in said
    assert "= [{kind: patch, count: 180, size_frac: 0.1}]  (default [])" in said
    assert "train.weight_decay" not in said
    assert printed(capsys, "train", "--preset", "configs/cc3m.yaml").count("(default") == 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "Sections: data, attacks, ingest"),
        (["--preset", "dmeo"], "one of cc3m, demo, fashion, laion, got 'dmeo'"),
        (["--preset", "configs/experiments/fashion.yaml"], "expected keys of a run, got 'seeds'"),
    ],
)
def test_what_cannot_be_shown_is_said(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str):
    assert guarded(["config", *arguments]) == ConfigError.exit_code
    assert says in capsys.readouterr().err
