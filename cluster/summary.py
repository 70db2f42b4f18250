"""The summary of a run as a table on the terminal, with the paths of its reports."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from roclip.report.pages import percent

VERDICT_STYLES = {"clean": "bold green", "suspicious": "bold yellow", "inconclusive": "yellow", "poisoned": "bold red"}
_SHARES = (
    ("zero-shot top-1", "zero_shot_top1"),
    ("zero-shot top-5", "zero_shot_top5"),
    ("linear probe top-1", "linear_probe_top1"),
    ("recall@1", "recall_at_1"),
    ("recall@5", "recall_at_5"),
    ("recall@10", "recall_at_10"),
    ("  image to text @1", "image_to_text_recall_at_1"),
    ("  text to image @1", "text_to_image_recall_at_1"),
)


def show_summary(console: Console, result: dict[str, Any], run: Path) -> None:
    """Print the result of a command: ingest counts, one column for each arm, and the paths of the reports."""
    if ingest := result.get("ingest"):
        failed = ", ".join(f"{count:,} {reason}" for reason, count in ingest.get("failed", {}).items())
        console.print(
            f"ingest: {ingest['succeeded']:,} of {ingest['urls']:,} URLs are in {ingest['shards']:,} shards"
            + (f" (lost: {failed})" if failed else ""),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if arms := result.get("arms"):
        console.print(arms_table(arms))
    for title, name in (("ingest", "ingest/report.html"), ("report", "report.html"), ("summary", "summary.json")):
        if (run / name).is_file():
            console.print(f"{title:<8} {run / name}", markup=False, highlight=False, soft_wrap=True)


def arms_table(arms: dict[str, dict[str, Any]]) -> Table:
    """One row for each metric and one column for each arm; attacks as successes of n with rate and 95 % interval, then the
    verdict. It is a Markdown table, so that it can be pasted into an issue as it is."""
    table = Table(box=box.MARKDOWN)
    table.add_column("")
    for arm in arms:
        table.add_column(arm, justify="right")
    for title, key in _SHARES:
        if any(arm.get(key) is not None for arm in arms.values()):
            table.add_row(title, *(percent(arm.get(key)) for arm in arms.values()))
    attacks = dict.fromkeys(name for arm in arms.values() for name in arm.get("attacks") or {})
    for name in attacks:
        table.add_row(f"{name} success", *(attack((arm.get("attacks") or {}).get(name)) for arm in arms.values()))
    verdicts = [(arm.get("oracle") or {}).get("verdict") for arm in arms.values()]
    if any(verdicts):
        table.add_row("oracle", *(Text(v or "not checked", VERDICT_STYLES.get(v or "", "dim")) for v in verdicts))
    repairs = [(arm.get("oracle") or {}).get("repair") for arm in arms.values()]
    if any(repairs):
        table.add_row("repair", *map(_repair, repairs))
    return table


def attack(result: dict[str, Any] | None) -> str:
    """An attack's successes of n, rate and 95 % interval, in one cell."""
    if not result:
        return "–"
    low, high = result["ci95"]
    return f"{result['successes']}/{result['n']}  {percent(result['rate'])} [{100 * low:.1f}, {100 * high:.1f}]"


def _repair(result: dict[str, Any] | None) -> Text:
    """Attack success before and after, and whether the repaired checkpoint is trusted."""
    if not result:
        return Text("–", "dim")
    if not result.get("samples"):
        return Text("nothing to repair with", "yellow")
    text = f"{percent(result['before']['attack'])} -> {percent(result['after']['attack'])}, "
    return Text(text + ("trusted" if result["accepted"] else "not trusted"), "green" if result["accepted"] else "red")
