"""The architecture, held by tests."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kit import REPOSITORY, environment

from roclip.config import load_config, model_file

PRESETS = sorted((REPOSITORY / "configs").glob("*.yaml"))
TOP_LEVEL = {"pyproject.toml", "roclip", "ingest", "cluster", "configs", "tests", "README.md", "LICENSE"}
PACKAGES = ("roclip/", "ingest/", "cluster/")
MAX_GROUND_FLOOR = 8
HEAVY = {"torch", "ray", "deepspeed", "faiss", "open_clip", "img2dataset"}


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def test_top_level_is_as_fixed():
    names = {name.split("/")[0] for name in tracked()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def test_files_hold_one_idea():
    long = {name: len((REPOSITORY / name).read_text().splitlines()) for name in tracked() if name.endswith(".py")}
    assert {name: lines for name, lines in long.items() if lines > 420 and not name.startswith("tests/")} == {}


@pytest.mark.parametrize("package", ["roclip", "ingest", "cluster"])
def test_ground_floor_is_clear(package: str):
    """What a package does is in its rooms; at most 8 files lie beside them."""
    assert len(list((REPOSITORY / package).glob("*.py"))) <= MAX_GROUND_FLOOR


def test_each_room_says_what_it_is():
    rooms = {str(Path(name).parent) for name in tracked() if name.startswith(PACKAGES) and name.endswith(".py")}
    silent = []
    for room in sorted(rooms):
        init = REPOSITORY / room / "__init__.py"
        if not init.is_file() or not ast.get_docstring(ast.parse(init.read_text())):
            silent.append(room)
    assert silent == []


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("roclip", set()),
        ("roclip.config", set()),
        ("roclip.checkpoint.pointers", set()),
        ("ingest", set()),
        ("cluster.cli", set()),
        ("cluster.pipeline", {"ray"}),
    ],
)
def test_light_imports_load_nothing_heavy(module, allowed):
    code = f"import {module}, sys; print(sorted({HEAVY!r} & set(sys.modules) - {allowed!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there():
    import roclip

    for name in roclip.__all__:
        assert callable(getattr(roclip, name))
    with pytest.raises(AttributeError, match="CaptionPool"):
        roclip.memory_bank  # noqa: B018


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_loads_and_its_model_is_known(path: Path):
    config = load_config(path, [] if _has_source(path) else ["data.images=images.parquet"])
    if model_file(config) is None:
        import open_clip

        assert config.model.name in open_clip.list_models()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_dry_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from cluster.cli.main import guarded

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("COLUMNS", "160")
    overrides = [] if _has_source(path) else [f"data.images={tmp_path / 'images.parquet'}"]
    if overrides:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"image": [b""] * 9, "caption": [""] * 9, "articleType": ["Shirts"] * 9})
        pq.write_table(table, tmp_path / "images.parquet")
    code = guarded(["run", str(path), *overrides, "--dry-run", f"runs={tmp_path}"])
    shown, complained = capsys.readouterr()
    assert code == 0, complained
    assert "steps" in shown
    assert "bytes" in shown.lower() or "GiB" in shown or "MiB" in shown


def test_our_cluster_package_is_the_one_that_is_imported():
    import cluster

    assert Path(cluster.__file__).parent == REPOSITORY / "cluster"


def _has_source(path: Path) -> bool:
    return bool(re.search(r"^\s+(urls|scenes|shards|images): *[^\s\"]", path.read_text(), re.M))


def test_no_two_public_classes_have_one_name():
    homes: dict[str, list[str]] = {}
    for name in tracked():
        if name.endswith(".py") and name.split("/")[0] in ("roclip", "ingest", "cluster"):
            for node in ast.parse((REPOSITORY / name).read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes.setdefault(node.name, []).append(name)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
