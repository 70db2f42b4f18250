"""The report of an experiment: `compare.json`, `table.md` for a README, `frontier.*` and `compare.html`."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from roclip.config import dump_config, strict
from roclip.report.comparison import attack_names, comparison
from roclip.report.curves import COLORS
from roclip.report.experiment import Experiment
from roclip.report.frontier import arm_colors, dose_response, frontier, save
from roclip.report.pages import duration, environment, percent
from roclip.storage import write_atomic

_SUSPECTS = {
    "auroc": "AUROC",
    "average_precision": "AP",
    "fpr_at_tpr_95": "FPR at TPR 95 %",
    "fpr_at_tpr_100": "FPR at TPR 100 %",
}
"""Figures of the suspects and their titles; older results have the first two."""


def write_comparison(folder: Path, experiment: Experiment, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write every file of the report into the experiment's folder and return the content of `compare.json`.

    Args:
        facts: `command`, `commits` that trained, `machine` and `wall_s`.
    """
    protocol = experiment.protocol
    head = {"schema": 1, "name": experiment.shared.name, "arms": list(experiment.arms), "seeds": list(protocol.seeds)}
    result = {**head, **facts, **comparison(folder, experiment)}
    write_atomic(folder / "compare.json", json.dumps(result, indent=1))
    write_atomic(folder / "table.md", markdown(result))
    colors, rows, points = arm_colors(experiment.arms), result["rows"], result["points"]
    drawings = {}
    if attack_names(rows):
        main = next(iter(points))
        drawings["frontier"] = save(frontier([row for row in rows if row["point"] == main], colors), folder, "frontier")
        if len(points) > 1:
            drawings["sweep"] = save(dose_response(rows, points, colors), folder, "sweep")
    templates = environment()
    templates.filters.update(poisons=poisons_text, suspects=suspects_text)
    page = templates.get_template("comparison.html.jinja").render(
        **result,
        places={arm: place % len(COLORS) for place, arm in enumerate(experiment.arms)},
        attacks=attack_names(rows),
        suspects_title=_suspects_title(rows),
        drawings=drawings,
        first={row["point"]: row["worst"] for row in rows if row["arm"] == experiment.arms[0]},
        protocol=strict.dump(protocol),
        config=dump_config(experiment.shared),
    )
    write_atomic(folder / "compare.html", page)
    return result


def markdown(result: Mapping[str, Any]) -> str:
    """The tables as Markdown: the worse phase of each figure, then both phases with every seed's successes."""
    rows, points = result["rows"], result["points"]
    attacks = attack_names(rows)
    first = {row["point"]: row["worst"] for row in rows if row["arm"] == result["arms"][0]}
    ranked = [title] if (title := _suspects_title(rows)) else []
    cells = [
        [
            row["arm"],
            *_useful(worst, first.get(row["point"])),
            *_pooled(worst, attacks),
            *([suspects_text(row)] if ranked else []),
        ]
        for row, worst in ((row, row["worst"]) for row in rows)
    ]
    views = [(row, phase, view) for row in rows for phase, view in row["phases"].items()]
    by_phase = [[row["arm"], phase, *_useful(view), *_by_seed(view, attacks)] for row, phase, view in views]
    useful = ["zero-shot top-1", "linear probe"]
    lines = [
        f"`{result['command']}`, commit {', '.join(result['commits'])}, {duration(result['wall_s'])}",
        "",
        *(f"- {point}: {poisons_text(counts)}" for point, counts in points.items()),
        "",
        f"Mean over {_seeds(rows)}, each figure of the worse of the last matched and the last plain epoch. In brackets: "
        f"difference from {result['arms'][0]} in points; successes of all seeds with their 95 % interval (Wilson), and how many "
        "images of other classes are called the target without a trigger (clean).",
        "",
        *_grid(["arm", *useful, *attacks, *ranked], cells, points, rows),
        "",
        "Both phases, successes by seed:",
        "",
        *_grid(["arm", "last epoch", *useful, *attacks], by_phase, points, [row for row, _, _ in views]),
        "",
    ]
    return "\n".join(lines)


def poisons_text(counts: Mapping[str, Any]) -> str:
    """'160 backdoor (1.00 %), 16 targeted (0.10 %) among 16,176 pairs'."""
    pairs = counts["pairs"]
    text = ", ".join(f"{n:,} {attack} ({percent(n / pairs, 2)})" for attack, n in counts["poisons"].items())
    return f"{text or 'no poisons'} among {pairs:,} pairs"


def _suspects_title(rows: Sequence[Mapping[str, Any]]) -> str:
    measured = next((each for row in rows for each in (row.get("suspects") or {}).values()), {})
    return f"suspects: {' / '.join(_SUSPECTS[figure] for figure in measured)}" if measured else ""


def suspects_text(row: Mapping[str, Any]) -> str:
    """'backdoor 0.991 / 0.870 / 0.004 / 0.019, …', in the order of `_SUSPECTS`; a dash without suspects."""
    found = row.get("suspects") or {}
    text = (f"{attack} {' / '.join(f'{value:.3f}' for value in each.values())}" for attack, each in found.items())
    return ", ".join(text) or "–"


def _useful(view: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> list[str]:
    cells = []
    for key in ("zero_shot_top1", "linear_probe_top1"):
        share = view.get(key)
        text = percent(share["mean"] if share else None)
        if share and first and first is not view and key in first:
            text += f" ({100 * (share['mean'] - first[key]['mean']):+.1f})"
        cells.append(text)
    return cells


def _pooled(view: Mapping[str, Any], attacks: Sequence[str]) -> list[str]:
    def pooled(result: Mapping[str, Any]) -> str:
        low, high = result["ci95"]
        clean = f"; clean {percent(result['clean']['rate'])}" if "clean" in result else ""
        counts = f"{result['successes']}/{result['n']}, {100 * low:.1f} to {100 * high:.1f}{clean}"
        return f"{percent(result['rate'])} ({counts})"

    return _attack_cells(view, attacks, pooled)


def _by_seed(view: Mapping[str, Any], attacks: Sequence[str]) -> list[str]:
    return _attack_cells(view, attacks, lambda r: ", ".join(f"{s['successes']}/{s['n']}" for s in r["by_seed"]))


def _attack_cells(
    view: Mapping[str, Any], attacks: Sequence[str], cell: Callable[[Mapping[str, Any]], str]
) -> list[str]:
    return [cell(view["attacks"][name]) if name in view["attacks"] else "–" for name in attacks]


def _seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = sorted({len(row["seeds"]) for row in rows})
    return f"{' to '.join(map(str, counts)) or 'no'} seed{'' if counts == [1] else 's'}"


def _grid(titles: list[str], cells: list[list[str]], points: Mapping[str, Any], rows: Sequence[Any]) -> list[str]:
    """A Markdown table; with several points, the first column names the point."""
    if len(points) > 1:
        titles = ["poisons", *titles]
        cells = [[row["point"], *line] for row, line in zip(rows, cells, strict=True)]
    return [f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *cells)]
