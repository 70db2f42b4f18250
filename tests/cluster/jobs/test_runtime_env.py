"""What is sent of a run."""

import dataclasses
from pathlib import Path

import pytest
from kit import preset

from cluster.jobs.runtime_env import for_cluster, identity_digest, pack
from roclip.config import BackdoorConfig, identity, load_config, model_file, parse_config, run_directory

PLAIN = "name: x\nmodel: {name: tiny}\ndata: {shards: 'a::s3://b/{0..9}.tar::/c', min_shards: 2}\n"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return load_config(preset(tmp_path, PLAIN))


def test_paths_are_sent_absolute_and_names_and_urls_as_they_are(config, tmp_path):
    (tmp_path / "segmenter").mkdir()
    (tmp_path / "logo.png").touch()
    backdoors = [BackdoorConfig(pattern=pattern) for pattern in ("stripes", "logo.png")]
    config = dataclasses.replace(
        config,
        oracle=dataclasses.replace(config.oracle, weights="hf:segmenter"),
        attacks=dataclasses.replace(config.attacks, backdoors=backdoors),
    )
    sent = for_cluster(config)
    assert sent.data.shards == f"{tmp_path}/a::s3://b/{{0..9}}.tar::/c"
    assert sent.data.urls == ""
    assert sent.runs == f"{tmp_path}/runs"
    assert sent.oracle.weights == f"hf:{tmp_path}/segmenter"
    assert [backdoor.pattern for backdoor in sent.attacks.backdoors] == ["stripes", f"{tmp_path}/logo.png"]
    assert sent.augment == config.augment
    assert sent.model == config.model
    assert sent.cluster.address == "auto"
    assert for_cluster(sent) == sent


def test_parcel_is_the_same_run_with_its_model_and_no_source(config, tmp_path):
    pack(config, tmp_path / "parcel")
    assert sorted(p.name for p in (tmp_path / "parcel").rglob("*") if p.is_file()) == ["preset.yaml", "tiny.json"]
    arrived = load_config(tmp_path / "parcel" / "preset.yaml")
    assert identity(arrived) == identity(config)
    assert model_file(arrived) == tmp_path / "parcel" / "models" / "tiny.json"


def test_run_that_moves_to_another_cluster_is_the_same_run(config):
    moved = dataclasses.replace(config.cluster, address="10.0.0.1:6379", queue_timeout_s=9.0, max_failures=7, workers=2)
    assert identity_digest(dataclasses.replace(config, cluster=moved)) == identity_digest(config)
    other = dataclasses.replace(config.train, lr=0.5)
    assert identity_digest(dataclasses.replace(config, train=other)) != identity_digest(config)


def test_model_of_a_run_is_found_in_its_directory_when_the_preset_is_gone(config, tmp_path):
    run = run_directory(config)
    (run / "models").mkdir(parents=True)
    (tmp_path / "models" / "tiny.json").rename(run / "models" / "tiny.json")
    assert model_file(config) is None
    assert model_file(dataclasses.replace(config, run_dir=str(run))) == run / "models" / "tiny.json"


def test_shipped_config_is_what_was_resolved(config, tmp_path):
    pack(for_cluster(config), Path("parcel"))
    text = (tmp_path / "parcel" / "preset.yaml").read_text()
    assert dataclasses.replace(parse_config(text), source=config.source) == for_cluster(config)
