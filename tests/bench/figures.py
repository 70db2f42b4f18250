"""Every published table and drawing, from the result files in `configs/experiments/results/`.

    python tests/bench/figures.py            rewrite the tables of results/, the drawings and the marked tables of the READMEs
    python tests/bench/figures.py --check    say which of them are not what the result files give, and end with 1

A README marks a table by `<!-- figures: NAME -->` before it and `<!-- end of figures -->` after it; NAME is a key of
`marked_tables`.
A result file carries the commit, command, machine and seeds of its figures.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

HOME = Path(__file__).parents[2]
RESULTS = HOME / "configs" / "experiments" / "results"
COMPARISONS = {
    "cifar10/compare": "table",
    "fashion/compare": "table",
    "fashion/sweep": "sweep",
    "fashion/attackers": "attackers",
}
"""A comparison's result file, and the stem of its Markdown."""
DRAWINGS = {"cifar10/compare": "frontier", "fashion/compare": "frontier", "fashion/sweep": "sweep"}
MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def published() -> Iterator[tuple[Path, str]]:
    """Each published file, and the text that it should have."""
    for part in PARTS.values():
        yield from part()


def readme_tables() -> Iterator[tuple[Path, str]]:
    tables = marked_tables()
    for path in readmes():
        yield path, MARKED.sub(lambda found: f"{found[1]}{tables[found[2]]}\n{found[3]}", path.read_text())


def comparison_tables() -> Iterator[tuple[Path, str]]:
    from roclip.report.comparison_report import markdown

    for name, stem in COMPARISONS.items():
        yield RESULTS / Path(name).with_name(f"{stem}.md"), markdown(result_file(name))


def comparison_drawings() -> Iterator[tuple[Path, str]]:
    from roclip.report.frontier import arm_colors, dose_response, frontier, save

    for name, stem in DRAWINGS.items():
        result = result_file(name)
        colors, rows, points = arm_colors(result["arms"]), result["rows"], result["points"]
        main = [row for row in rows if row["point"] == next(iter(points))]
        figure = frontier(main, colors) if stem == "frontier" else dose_response(rows, points, colors)
        with tempfile.TemporaryDirectory() as folder:
            save(figure, Path(folder), stem)
            yield RESULTS / Path(name).with_name(f"{stem}.svg"), Path(folder, f"{stem}.svg").read_text()


def bench_drawings() -> Iterator[tuple[Path, str]]:
    import plan
    import scale

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan.plot(result_file("plan"), folder / "plan.svg")
        yield RESULTS / "plan.svg", (folder / "plan.svg").read_text()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            scale.report(RESULTS / "scale-measured.json", folder / "scale.svg")
        yield RESULTS / "scale.md", printed.getvalue()
        yield RESULTS / "scale.svg", (folder / "scale.svg").read_text()


PARTS = {
    "READMEs": readme_tables,
    "tables": comparison_tables,
    "drawings": comparison_drawings,
    "bench": bench_drawings,
}


def marked_tables() -> dict[str, str]:
    """The tables that READMEs carry between their marks."""
    tables = {
        path.stem: recorded(json.loads(path.read_text()))
        for path in sorted(RESULTS.glob("*.json"))
        if _is_recorded(path)
    }
    for name in COMPARISONS:
        folder, stem = name.split("/")
        result = result_file(name)
        tables[f"{folder}-{stem}"] = compared(result)
        if stem == "compare":
            tables[f"{folder}-phases"] = by_phase(result)
    tables["results"] = summary()
    return tables


def recorded(result: Mapping[str, Any]) -> str:
    """A table whose cells were written down by hand, each row with commit, machine and seeds."""
    return grid(result["columns"], [row["cells"] for row in result["rows"]])


def compared(result: Mapping[str, Any]) -> str:
    """A comparison's worse phase: usefulness, attack success with the clean rate, and the suspects' AUROC."""
    several = len(result["points"]) > 1
    attacks = ("backdoor", "blended", "targeted")
    titles = [
        "arm",
        "zero-shot",
        "linear probe",
        "patch",
        "Blended",
        "targeted",
        "suspects, AUROC: patch, Blended, targeted",
    ]
    rows = []
    for row in result["rows"]:
        worst, found = row["worst"], row.get("suspects") or {}
        auroc = ", ".join(f"{found[attack]['auroc']:.3f}" for attack in attacks if attack in found)
        useful = (f"{100 * worst[key]['mean']:.1f} %" for key in ("zero_shot_top1", "linear_probe_top1"))
        cells = [f"`{row['arm']}`", *useful, *(success(worst["attacks"][attack]) for attack in attacks), auroc]
        rows.append([row["point"], *cells] if several else cells)
    return grid(["poisons", *titles] if several else titles, rows)


def by_phase(result: Mapping[str, Any]) -> str:
    """The last matched and the last plain epoch, successes by seed."""
    rows = []
    for row in result["rows"]:
        for phase, view in row["phases"].items():
            useful = (f"{100 * view[key]['mean']:.1f} %" for key in ("zero_shot_top1", "linear_probe_top1"))
            counts = []
            for attack in ("backdoor", "blended", "targeted"):
                seeds = view["attacks"][attack]["by_seed"]
                counts.append(f"{', '.join(str(seed['successes']) for seed in seeds)} of {seeds[0]['n']}")
            rows.append([f"`{row['arm']}`", phase, *useful, *counts])
    return grid(["arm", "last epoch", "zero-shot", "linear probe", "patch", "Blended", "targeted"], rows)


def summary() -> str:
    """The one table of the main README: undefended, the paper's setting and ours, on both data sets."""
    rows = []
    for data in ("fashion", "cifar10"):
        for row in result_file(f"{data}/compare")["rows"]:
            worst = row["worst"]
            rates = (rate(worst["attacks"][attack]) for attack in ("backdoor", "blended", "targeted"))
            rows.append([data, f"`{row['arm']}`", f"{100 * worst['zero_shot_top1']['mean']:.1f} %", *rates])
    return grid(["data", "arm", "zero-shot", "patch (clean)", "Blended (clean)", "targeted"], rows)


def rate(result: Mapping[str, Any]) -> str:
    clean = f" ({100 * result['clean']['rate']:.1f})" if "clean" in result else ""
    return f"{100 * result['rate']:.1f} %{clean}"


def success(result: Mapping[str, Any]) -> str:
    low, high = result["ci95"]
    clean = f"; clean {100 * result['clean']['rate']:.1f} %" if "clean" in result else ""
    counts = f"{result['successes']}/{result['n']}, {100 * low:.1f} to {100 * high:.1f}"
    return f"{100 * result['rate']:.1f} % ({counts}{clean})"


def grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(line)} |".replace("|  |", "| |") for line in (titles, ["---"] * len(titles), *rows)
    )


def result_file(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def readmes() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*README.md"], cwd=HOME, capture_output=True, text=True, check=True)
    return [HOME / name for name in listed.stdout.splitlines()]


def stale(part: str) -> list[Path]:
    """The published files of a part that are not what the result files give."""
    return [path for path, text in PARTS[part]() if not same(path, text)]


def same(path: Path, text: str) -> bool:
    """Whether a file is this text; a drawing, whether it shows the same."""
    if not path.is_file():
        return False
    if path.suffix != ".svg":
        return path.read_text() == text
    return drawn(path.read_text()) == drawn(text)


def drawn(svg: str) -> list[str]:
    """What a drawing shows: its texts and its positions to a tenth of a point, which versions of Matplotlib agree on."""
    said = re.findall(r"<!-- (.*?) -->", svg)
    placed = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg)
    return [*said, *(f"{float(x):.1f} {float(y):.1f}" for x, y in placed)]


def _is_recorded(path: Path) -> bool:
    return "columns" in json.loads(path.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.check:
        found = [path for part in PARTS for path in stale(part)]
        for path in found:
            print(f"{path.relative_to(HOME)} is not what the result files give: run python tests/bench/figures.py")
        return 1 if found else 0
    for path, text in published():
        if not same(path, text):
            path.write_text(text)
            print(f"wrote {path.relative_to(HOME)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
