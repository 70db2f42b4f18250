"""Keys of older versions are errors that say what to write instead."""

import re
from pathlib import Path

import pytest

from roclip.config import load_config, parse_config
from roclip.config.reference import sections
from roclip.config.renamed import GONE, RENAMED
from roclip.errors import ConfigError

KNOWN = {key.name for section in sections() for key in section.keys if not key.name.startswith("deploy.")}


def _nested(key: str, value: str) -> str:
    """YAML of one key in its sections."""
    *above, last = key.split(".")
    return f"{''.join(f'{name}: {{' for name in above)}{last}: {value}{'}' * len(above)}"


@pytest.mark.parametrize("old", sorted({**RENAMED, **GONE}))
def test_old_key_is_refused_with_what_to_write_instead(tmp_path: Path, old: str):
    told = f"{old} is called {RENAMED[old]} now." if old in RENAMED else f"{old} is gone: {GONE[old]}."
    preset = tmp_path / "old.yaml"
    preset.write_text("data: {scenes: 10}\n")
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_config(preset, [f"{old}=1"])
    preset.write_text(_nested(old, "1"))
    with pytest.raises(ConfigError, match=re.escape(f"{preset}: {told}")):
        load_config(preset)


def test_new_names_exist_and_old_ones_do_not():
    assert {new.split(",")[0].split(" ")[0] for new in RENAMED.values()} <= KNOWN
    assert not {*RENAMED, *GONE} & KNOWN


def test_config_of_an_old_run_names_all_its_old_keys():
    with pytest.raises(ConfigError) as caught:
        parse_config("data: {scenes: 1}\npool: {witnesses: 3, scout: true}\ndeploy: {image: x}\ntrain: {lr: 1.0}\n")
    said = str(caught.value)
    assert "pool.witnesses is called pool.neighbours now. pool.scout is called pool.suspicion_model now." in said
    assert "deploy is gone" in said
    assert "train" not in said


def test_entry_of_an_old_section_is_found_under_it(tmp_path: Path):
    preset = tmp_path / "old.yaml"
    preset.write_text("data: {scenes: 10}\n")
    with pytest.raises(
        ConfigError, match=r"attacks\.backdoor is called attacks\.backdoors, an entry of kind patch now\."
    ):
        load_config(preset, ["attacks.backdoor.count=5"])
