"""The list of all keys that `roclip config` prints."""

import dataclasses

import pytest

from roclip.config import Config, DeployConfig
from roclip.config.reference import Key, flattened, sections, unit_of

KEYS = [key for section in sections() for key in section.keys]
OF_A_RUN = [key for key in KEYS if not key.name.startswith("deploy.")]
MAX_KEYS = 187
"""Of a run's config, with those of a list's entries."""


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_key_has_a_docstring_that_is_a_sentence(key: Key):
    assert len(key.text) > 15
    assert key.text.endswith(".")
    assert key.text[0].isupper() or key.text[0] in "`/"


def test_section_has_a_docstring():
    assert [section.name for section in sections() if not section.text] == []


def test_all_fields_are_there():
    names = {key.name for key in KEYS}
    for item in dataclasses.fields(Config):
        assert item.name in names or any(name.startswith(f"{item.name}.") for name in names)
    assert {f"deploy.{item.name}".split(".")[1] for item in dataclasses.fields(DeployConfig)} == {
        name.split(".")[1] for name in names if name.startswith("deploy.")
    }
    assert {"attacks.backdoors", "attacks.backdoors.N.kind", "ingest.policy.robots", "pool.neighbours"} <= names


def test_config_stays_one_that_a_person_can_hold():
    assert len(OF_A_RUN) <= MAX_KEYS


def test_types_defaults_and_units_are_in_words():
    by_name = {key.name: key for key in KEYS}
    assert by_name["train.precision"].kind == "fp32 | bf16"
    assert by_name["train.betas"].kind == "[float, float]"
    assert by_name["pool.match_every"].kind == "int | text"
    assert by_name["oracle.label_map"].kind == "{text: text}"
    assert by_name["attacks.backdoors"].kind == "list of entries"
    assert by_name["deploy.aws.region"].default == ""
    assert (by_name["pool.size"].default, by_name["pool.size"].unit) == (21_845, "pairs")
    assert unit_of("ingest.policy.max_bytes") == "bytes"
    assert unit_of("ingest.policy.host_requests_per_s") == "requests a second"
    assert unit_of("train.lr") == ""


def test_value_of_a_mapping_or_a_list_is_one_value():
    content = {"name": "x", "oracle": {"label_map": {"couch": "sofa"}}, "attacks": {"backdoors": [{"kind": "sig"}]}}
    assert dict(flattened(content)) == {
        "name": "x",
        "oracle.label_map": {"couch": "sofa"},
        "attacks.backdoors": [{"kind": "sig"}],
    }
