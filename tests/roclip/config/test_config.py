"""Presets, overrides and run directories."""

import dataclasses
import datetime
from pathlib import Path

import pytest

from roclip.config import (
    Config,
    DataConfig,
    FetchPolicy,
    dump_config,
    load_config,
    model_file,
    parse_config,
    run_directory,
)
from roclip.errors import ConfigError

PRESET = """\
name: test
data: {scenes: 100}
arms: [clip, roclip]
augment: {crop_scale: [0.8, 1.0]}
train: {lr: 1.0e-3, betas: [0.9, 0.95]}
"""


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "test.yaml"
    path.write_text(PRESET)
    return path


def test_config_is_the_same_when_dumped_and_parsed(preset: Path):
    config = load_config(
        preset, ["pool.size=64", "evaluate.templates=['a {}']", "attacks.backdoors=[{kind: patch, count: 5}]"]
    )
    again = parse_config(dump_config(config))
    assert again == config
    assert isinstance(again.train.betas, tuple)
    assert dump_config(again) == dump_config(config)


def test_values_come_from_override_then_preset_then_default_when_loaded(preset: Path):
    config = load_config(preset, ["train.lr=2e-4"])
    assert config.train.lr == 2e-4
    assert config.train.betas == (0.9, 0.95)
    assert config.train.epochs == Config(data=DataConfig(scenes=1)).train.epochs
    assert config.source == str(preset)


def test_last_override_wins_when_given_twice(preset: Path):
    assert load_config(preset, ["train.lr=1", "train.lr=2"]).train.lr == 2.0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("pool.siz=3", "unknown key 'pool.siz'. Did you mean 'pool.size'?"),
        ("trian.lr=1", "unknown key 'trian'. Did you mean 'train'?"),
        ("attacks.backdoors=[{cuont: 1}]", "unknown key 'cuont'. Did you mean 'count'?"),
        ("attacks.backdoors.0.count=1", "expected one of the 0 entries, counted from 0"),
        ("attacks.backdoors=[{kind: patch, count: 1},{kind: noise_patch, count: 1}]", "got 'backdoor' 2 times"),
        ("train.objective=repair", "Set model.pretrained"),
        ("pool.size=many", "pool.size"),
        ("train.precision=fp8", "train.precision"),
        ("train.lr", "expected key=value"),
        ("train.lr=-1", "train.lr: expected more than 0, got -1.0"),
        ("pool.filter_frac=[0.5,1.5]", "pool.filter_frac: expected two shares from 0 to 1, got (0.5, 1.5)"),
        ("augment.crop_scale=[0.9,0.5]", "augment.crop_scale: expected 0 < low <= high <= 1"),
        ("data.urls=urls.csv", "expected one of data.urls, data.images and data.scenes, got several"),
        ("data.upsampling=[1,2]", "expected a number from 0 on, not all 0, for each of several sources"),
        ("data.shards=a/{0..9}.tar", "expected one folder to ingest into, got the pattern"),
        ("train.spike_factor=0.5", "expected more than 1, or 0 for none, got 0.5"),
        ("cluster.min_workers=2", "cluster.min_workers: expected 0 to cluster.workers = 1, got 2"),
        ("arms=[clip,clip]", "expected one or more different arms"),
        ("arms=[siglip]", "arms"),
        ("name=a/b", "name: expected letters"),
    ],
)
def test_wrong_override_is_named_when_loaded(preset: Path, override: str, says: str):
    with pytest.raises(ConfigError) as caught:
        load_config(preset, [override])
    assert says in str(caught.value)


def test_wrong_key_is_named_with_the_file_when_in_the_preset(preset: Path):
    preset.write_text(PRESET + "trai: {lr: 1}\n")
    with pytest.raises(ConfigError, match=r"test\.yaml: unknown key 'trai'. Did you mean 'train'\?"):
        load_config(preset)


def test_several_errors_are_config_errors_when_the_preset_is_no_config(preset: Path):
    for text in ("data: [1", "- 1\n- 2\n", "data: {}\n", "name: x\n", "data: {scenes: 1}\nname: ${nope}\n"):
        preset.write_text(text)
        with pytest.raises(ConfigError, match=r"test\.yaml"):
            load_config(preset)


def test_missing_preset_lists_presets_when_there_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text(PRESET)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"demo\.yml: no such config. Presets here: configs/demo\.yaml"):
        load_config("configs/demo.yml")


def test_png_quality_is_checked_as_compression_when_the_format_is_png(preset: Path):
    with pytest.raises(ConfigError, match=r"0 to 9 for png"):
        load_config(preset, ["ingest.encode_format=png"])
    # Overrides are applied one by one but checked together.
    config = load_config(preset, ["ingest.encode_format=png", "ingest.encode_quality=6"])
    assert config.ingest.encode_quality == 6


def test_config_cannot_be_changed_when_loaded(preset: Path):
    config = load_config(preset)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.pool.size = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_run_directory_is_dated_when_new(preset: Path, tmp_path: Path):
    config = load_config(preset, [f"runs={tmp_path / 'runs'}"])
    path = run_directory(config, today=datetime.date(2026, 1, 31))
    assert path == tmp_path / "runs" / "2026-01-31-test"
    assert not path.exists()


def test_run_directory_is_the_same_again_when_the_config_is(preset: Path, tmp_path: Path):
    config = load_config(preset, [f"runs={tmp_path / 'runs'}"])
    first = run_directory(config, today=datetime.date(2026, 1, 31))
    first.mkdir(parents=True)
    (first / "config.yaml").write_text(dump_config(config))
    assert run_directory(config, today=datetime.date(2026, 2, 3)) == first


def test_run_directory_is_another_when_the_config_is(preset: Path, tmp_path: Path):
    runs, day = f"runs={tmp_path / 'runs'}", datetime.date(2026, 1, 31)
    paths = []
    for seed in range(3):
        config = load_config(preset, [runs, f"seed={seed}"])
        path = run_directory(config, today=day)
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(dump_config(config))
        paths.append(path.name)
    assert paths == ["2026-01-31-test", "2026-01-31-test.2", "2026-01-31-test.3"]
    assert run_directory(load_config(preset, [runs, "seed=1"])).name == "2026-01-31-test.2"


def test_run_directory_is_the_newest_when_two_have_the_config(preset: Path, tmp_path: Path):
    config = load_config(preset, [f"runs={tmp_path / 'runs'}"])
    for day in ("2026-01-30", "2026-02-01"):
        path = tmp_path / "runs" / f"{day}-test"
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(dump_config(config))
    assert run_directory(config).name == "2026-02-01-test"


def test_run_directory_is_what_the_config_says_when_it_says(preset: Path, tmp_path: Path):
    assert run_directory(load_config(preset, [f"run_dir={tmp_path / 'here'}"])) == tmp_path / "here"


def test_model_file_is_beside_the_preset_when_there_is_one(preset: Path):
    (preset.parent / "models").mkdir()
    own = preset.parent / "models" / "tiny.json"
    own.write_text("{}")
    assert model_file(load_config(preset, ["model.name=tiny"])) == own
    assert model_file(load_config(preset)) is None


def test_nothing_after_the_equals_sign_is_the_empty_text(tmp_path):
    (tmp_path / "preset.yaml").write_text("data: {urls: list.csv, shards: shards}")
    assert load_config(tmp_path / "preset.yaml", ["data.urls="]).data.urls == ""


@pytest.mark.parametrize("entry", ["cdn.example", "cdn.example=fast", "cdn.example=0", "=5"])
def test_rate_of_a_domain_must_be_a_number(entry):
    with pytest.raises(ConfigError, match=r"ingest\.policy\.host_rates: expected domain=requests a second"):
        FetchPolicy(host_rates=(entry,))


def test_rates_of_domains_are_read():
    assert FetchPolicy(host_rates=("CDN.example=500", "b.example=0.5")).rates == (
        ("cdn.example", 500.0),
        ("b.example", 0.5),
    )
