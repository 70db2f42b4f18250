"""What to do next in a run: what failed, why, and the command that continues."""

import shlex
from dataclasses import dataclass
from typing import Literal

from roclip.data.outcomes import REASONS
from roclip.report.oracle_state import OracleState
from roclip.report.pages import percent
from roclip.report.run_state import RunState
from roclip.report.training_state import TrainingState

DATA_WAIT_FRAC = 0.3
"""Share of a step's time spent waiting, above which loading slows the training down."""
USABLE_FRAC = 0.5
DISK_FREE_FRAC = 0.05
SLOW_RANK = 1.5
"""A rank is slow if it takes this many times as long as the median rank."""


@dataclass(frozen=True)
class NextStep:
    """One piece of advice."""

    tone: Literal["bad", "warn", "good"]
    title: str
    text: str
    command: str = ""


def next_steps(state: RunState) -> tuple[NextStep, ...]:
    """All advice, the most urgent first."""
    run = shlex.quote(str(state.path))
    again = f"roclip run {run}"
    steps = [step for training in state.trainings for step in _training_steps(state, training, again)]
    if state.status == "stopped":
        at = next((stage.title for stage in state.stages if stage.status == "stopped"), "between two stages")
        steps.append(
            NextStep(
                "bad", "Nobody works on this run", f"It stopped at: {at}. The same command goes on from there.", again
            )
        )
    steps += _ingest_steps(state)
    steps += [step for oracle in state.oracles for step in _oracle_steps(oracle, run, state)]
    if state.disk_free_frac < DISK_FREE_FRAC:
        steps.append(
            NextStep(
                "warn",
                "The disk is nearly full",
                f"{percent(state.disk_free_frac)} of it is free. Checkpoints are written whole or not at all, so a full disk "
                "stops the run; train.keep_checkpoints says how many are kept.",
            )
        )
    if state.unreadable:
        names = ", ".join(f"unreadable: {name} ({why})" for name, why in sorted(state.unreadable.items()))
        steps.append(
            NextStep(
                "warn",
                "Files that cannot be read",
                f"{names}. Their previous contents stay on this page as long as it runs.",
            )
        )
    return tuple(sorted(steps, key=lambda step: ("bad", "warn", "good").index(step.tone)))


def _training_steps(state: RunState, training: TrainingState, again: str) -> list[NextStep]:
    steps, name = [], training.name
    cause, step = training.failure.rstrip("."), training.latest or "the beginning"
    if training.failure and state.status != "running":
        steps.append(
            NextStep(
                "bad",
                f"{name} ended",
                f"{cause}. Logs: {name}/log. The same command resumes from {step}.",
                again,
            )
        )
    elif training.failure:
        steps.append(
            NextStep(
                "warn",
                f"{name} lost a rank",
                f"{cause}. It starts again from {step}.",
            )
        )
    if training.left_out:
        steps.append(
            NextStep(
                "warn",
                f"{name} left out {len(training.left_out)} steps",
                f"The last: {training.left_out[-1]}. Their samples are listed in {name}/diverged.json; a lower train.lr "
                "or a longer train.warmup_epochs helps if there are many.",
            )
        )
    if state.status == "running" and training.row.get("data_wait_frac", 0.0) > DATA_WAIT_FRAC:
        steps.append(
            NextStep(
                "warn",
                f"{name} waits for its data",
                f"{percent(training.row['data_wait_frac'], 0)} of a step's time. More data.loader_workers, or a data.cache_dir "
                "on a local disk where the shards lie on a store.",
            )
        )
    return steps


def _ingest_steps(state: RunState) -> list[NextStep]:
    ingest = state.ingest
    if ingest is None or ingest.usable is None or ingest.usable >= USABLE_FRAC or not ingest.failed:
        return []
    reason = next(iter(ingest.failed))
    why = REASONS[reason].help if reason in REASONS else reason.replace("_", " ")
    return [
        NextStep(
            "warn",
            f"Only {percent(ingest.usable, 0)} of the URLs gave a pair",
            f"Most often: {reason} ({why}). ingest/report.html says which hosts.",
        )
    ]


def _oracle_steps(oracle: OracleState, run: str, state: RunState) -> list[NextStep]:
    arm, trusted = oracle.arm, {training.name: training.trusted for training in state.trainings}.get(oracle.arm, "")
    export = f"roclip export {run} --arm {shlex.quote(arm)} --out model"
    page = f"{arm}/oracle/report.html says why"
    if oracle.checking is not None or oracle.rechecking is not None or not oracle.verdict:
        return []
    if trusted:
        how = "repaired, and trusted" if trusted.startswith("repaired-") else oracle.verdict
        return [NextStep("good", f"{arm} is {how}", f"{trusted} may leave the run.", export)]
    if oracle.repair is not None and not oracle.repair.accepted:
        return [NextStep("bad", f"The repair of {arm} is not good enough", " ".join(oracle.repair.reasons) or page)]
    if oracle.verdict == "poisoned":
        labels = ", ".join(oracle.target_labels[:5]) or "unknown labels"
        return [
            NextStep(
                "bad",
                f"{arm} is poisoned",
                f"Towards {labels}; {page}. Do not ship it: a repair fine-tunes it on a few images and checks it again.",
                f"roclip oracle {run} 'arms=[{arm}]' --repair",
            )
        ]
    if oracle.verdict == "suspicious":
        return [NextStep("warn", f"{arm} is suspicious", f"{page}.", f"roclip oracle {run} 'arms=[{arm}]' --repair")]
    if oracle.verdict == "inconclusive":
        unseen = f"The oracle cannot check {', '.join(oracle.unchecked)}; " if oracle.unchecked else ""
        return [
            NextStep(
                "warn",
                f"The check of {arm} is inconclusive",
                f"{unseen}{page}. An oracle that sees more (oracle.weights, oracle.epochs) can tell.",
            )
        ]
    return []
