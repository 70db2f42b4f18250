"""The READMEs name only what is there, and their figures are what the committed result files give."""

import ast
import dataclasses
import re
import shlex
import subprocess
import typing
from functools import cache
from pathlib import Path

import pytest
from kit import REPOSITORY

from roclip.config import Config, DeployConfig
from roclip.report.experiment import Protocol

MAX_LINES, MAX_COLUMNS, MAX_BYTES = 250, 120, 20_000
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
).stdout.splitlines()
FOLDERS = {str(parent) for name in TRACKED for parent in Path(name).parents}
READMES = [name for name in TRACKED if Path(name).name == "README.md"]
TOP = ("roclip/", "ingest/", "cluster/", "configs/", "tests/")
COMMIT = re.compile(r"\b(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{7}\b")

of_each_readme = pytest.mark.parametrize("readme", READMES)


def blocks(readme: str) -> list[str]:
    """The lines of the code blocks, those that end with a backslash joined with the next one."""
    text = (REPOSITORY / readme).read_text().replace("\\\n", " ")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    return [line.strip() for line in [*indented, *"\n".join(fenced).splitlines()]]


def spans(readme: str) -> list[str]:
    """What stands between backticks in running text."""
    text = re.sub(r"^```.*?^```", "", (REPOSITORY / readme).read_text(), flags=re.MULTILINE | re.DOTALL)
    prose = "\n".join("" if line.startswith("    ") else line for line in text.splitlines())
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n|\n(?=\||- |\d\. )", prose))
    return [span for paragraph in paragraphs for span in re.findall(r"`([^`]+)`", paragraph)]


def commands(readme: str) -> list[list[str]]:
    """The words of each `roclip …`, `python …` and `torchrun …` command of a README."""
    found = []
    for line in [*blocks(readme), *spans(readme)]:
        for part in line.split("&&"):
            text = part.split("  #")[0].strip()
            if re.match(r"(\S*/)?(roclip|python3?|torchrun) \S", text):
                found.append(shlex.split(text, comments=True))
    return found


@cache
def cli() -> dict[str, set[str]]:
    """Each command of `roclip` and its options."""
    import typer

    from cluster.cli.main import app

    group = typer.main.get_command(app)
    common = {"-h", "--help"}
    return {
        name: common
        | {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


@cache
def keys() -> set[str]:
    """Every key of a config, of an experiment and of a cluster's description, sections included."""
    return {*_keys(Config), *_keys(Protocol), *_keys(DeployConfig, "deploy.")}


def _keys(schema: type, prefix: str = "") -> set[str]:
    found: set[str] = set()
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        found.add(prefix + item.name)
        for kind in (hints[item.name], *typing.get_args(hints[item.name])):
            if dataclasses.is_dataclass(kind):
                found |= _keys(typing.cast(type, kind), f"{prefix}{item.name}.")
    return found


def test_readme_is_one_page():
    text = (REPOSITORY / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= MAX_LINES
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []
    assert len(text.encode()) <= MAX_BYTES


def test_readme_has_the_two_commands():
    text = (REPOSITORY / "README.md").read_text()
    install = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && "
    assert f"    {install}.venv/bin/roclip run configs/demo.yaml\n" in text
    assert f"    {install}.venv/bin/pytest\n" in text


def test_readme_names_every_command():
    text = (REPOSITORY / "README.md").read_text()
    assert [name for name in cli() if not re.search(rf"`(roclip )?{name}\b", text)] == []


@of_each_readme
def test_readme_tells_no_history(readme: str):
    assert COMMIT.findall((REPOSITORY / readme).read_text()) == []


@of_each_readme
def test_links_lead_somewhere(readme: str):
    text = (REPOSITORY / readme).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / readme).parent / path if path else REPOSITORY / readme
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


@of_each_readme
def test_paths_are_there(readme: str):
    for word in (word.strip("',:;") for text in [*blocks(readme), *spans(readme)] for word in text.split()):
        if any(mark in word for mark in "…*{}<>$="):
            continue
        if word.startswith(TOP):
            assert word.rstrip("/") in FOLDERS | set(TRACKED), word
        elif re.fullmatch(r"[\w/-]+\.py", word):
            assert any(name == word or name.endswith(f"/{word}") for name in TRACKED), word


@of_each_readme
def test_commands_and_options_exist(readme: str):
    for program, *words in commands(readme):
        if Path(program).name == "roclip":
            command, *given = words
            assert command in cli(), [program, *words]
            options = cli()[command]
        elif words[0] == "-m" or (Path(program).name == "torchrun" and "-m" in words):
            module = words[words.index("-m") + 1]
            if not module.startswith(("roclip", "ingest", "cluster")):
                continue
            path = module.replace(".", "/")
            assert {f"{path}.py", f"{path}/__main__.py"} & set(TRACKED), module
            continue
        else:
            script = next((word for word in words if word.endswith(".py")), None)
            assert script in TRACKED, words
            source = ast.unparse(ast.parse((REPOSITORY / str(script)).read_text()))
            options, given = set(re.findall(r"'(--[\w-]+)'", source)), words[words.index(str(script)) + 1 :]
        asked = {word.split("=")[0] for word in given if word.startswith("-") and word.strip("-.")}
        assert asked <= options, [program, *words]


@of_each_readme
def test_keys_exist(readme: str):
    sections = {item.name for item in dataclasses.fields(Config)}
    named = {word for text in [*blocks(readme), *spans(readme)] for word in re.split(r"[\s'\"]+", text)}
    for word in named:
        key = re.match(r"([a-z_]+(?:\.[a-z_0-9]+)*)(=|:?$)", word)
        if not key or f"{key[1].replace('.', '/')}.py" in TRACKED or key[1].replace(".", "/") in FOLDERS:
            continue
        if "." in key[1] and key[1].split(".")[0] in sections:
            assert key[1] in keys(), word
    for program, *words in commands(readme):
        if Path(program).name == "roclip":
            for word in words:
                if (key := re.match(r"([a-z_][\w.]*)=", word)) and not word.startswith("-"):
                    assert key[1] in keys(), [program, *words]


@pytest.mark.parametrize("part", ["READMEs", "tables", "drawings", "bench"])
def test_published_figures_are_what_the_result_files_give(part: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tests" / "bench"))
    import figures

    assert part in figures.PARTS
    assert figures.stale(part) == [], "run python tests/bench/figures.py"


def test_a_stale_figure_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tests" / "bench"))
    import figures

    readme = tmp_path / "README.md"
    readme.write_text((REPOSITORY / "README.md").read_text().replace("95.6 %", "95.7 %"))
    monkeypatch.setattr(figures, "readmes", lambda: [readme])
    assert figures.stale("READMEs") == [readme]


def test_result_files_say_what_they_are_of():
    for path in sorted((REPOSITORY / "configs" / "experiments" / "results").rglob("*.json")):
        text = path.read_text()
        assert '"command"' in text, path
        assert '"commit' in text, path
        assert '"machine"' in text, path
        assert '"seeds"' in text or path.name == "scale-measured.json", path
