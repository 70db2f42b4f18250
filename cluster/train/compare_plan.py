"""The plan of `roclip compare`: what it would train. Needs no torch and no Ray."""

from rich.console import Console
from rich.table import Table

from cluster.plan import filtered_epochs, human_bytes, make_plan, phases
from roclip.config import Config, dump_config, run_directory, strict
from roclip.report.experiment import Experiment


def show_experiment(console: Console, experiment: Experiment) -> None:
    """Print the resolved experiment, its corpora and its arms. Raises `ConfigError` for an unknown model."""
    shared = experiment.shared
    for text in (strict.dump(experiment.protocol), dump_config(shared)):
        console.print(text.rstrip(), markup=False, highlight=False, soft_wrap=True)
    console.print()
    plans = {corpus.name: make_plan(corpus.config) for corpus in experiment.corpora}
    table = Table(title=f"Plan of {shared.name}", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("folder", str(run_directory(shared)))
    for name, plan in plans.items():
        rows = f"{plan.rows:,} URLs" if plan.rows is not None else f"unknown ({plan.problem})"
        table.add_row(f"corpus {name}", f"{rows}, at most {plan.steps or 'unknown'} steps an arm")
    for training in experiment.corpora[0].trainings:
        table.add_row(f"arm {training.arm}", _phases(training.config))
    total = len(plans) * len(experiment.arms)
    table.add_row("trainings", f"{total}: {len(plans)} corpora x {len(experiment.arms)} arms")
    steps = [plan.steps for plan in plans.values()]
    if None not in steps:
        table.add_row("steps", f"at most {sum(filter(None, steps)) * len(experiment.arms):,} in all")
    disk = sum((plan.shard_bytes or 0) + (plan.checkpoint_bytes or 0) * len(experiment.arms) for plan in plans.values())
    table.add_row("bytes on disk", f"about {human_bytes(disk)} in all")
    console.print(table)
    console.print()
    console.print("[bold]Steps[/] (nothing was done)")
    for number, stage in enumerate(_STAGES, 1):
        console.print(f"  {number}. {stage}", markup=False, highlight=False, soft_wrap=True)


_STAGES = (
    "make each corpus once: serve it from a loopback origin, poisons included, and ingest it",
    "train every arm on every corpus, as many at a time as there are ranks for",
    "write compare.json, compare.html, table.md, frontier.svg and frontier.png",
)


def _phases(config: Config) -> str:
    if config.arms == ("clip",):
        return "clip"
    epochs = [str(epoch) for epoch in range(1, config.train.epochs + 1) if "matched" in phases(config, epoch, None)]
    filtered = "sample filter" if filtered_epochs(config, None) else "no sample filter"
    return f"roclip, matched epochs {', '.join(epochs) or 'none'}, {filtered}"
