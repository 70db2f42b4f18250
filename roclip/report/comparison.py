"""The figures of an experiment, from the files of its trainings: one row for each arm and point of the sweep.

A training has two faces: RoCLIP's attack success and usefulness depend on whether its last epoch was matched or plain.
A row's headline is the worse of the two, figure by figure; `phases` has both, and `end` is the last checkpoint.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from roclip.evaluation.ranking import auroc, average_precision, fpr_at_tpr
from roclip.evaluation.rate import rate
from roclip.metrics.registry import read_metrics
from roclip.report.experiment import Experiment

SHARES = ("zero_shot_top1", "zero_shot_top5", "linear_probe_top1", "recall_at_1", "recall_at_5", "recall_at_10")
"""Shares that are kept from an evaluation, besides its attacks, if they were measured."""
SUSPECTS = "suspects.parquet"
"""The suspects of a training, in the folder of an arm: key, and a score that is higher for a more suspect sample."""
Figures = Mapping[str, Any]
"""Shares by name, and `attacks`: for each the successes, n and rate."""


def comparison(folder: Path, experiment: Experiment) -> dict[str, Any]:
    """The results, as `compare.json` holds them.

    Returns:
        `points`: for each of the sweep the number of pairs and of poisons by attack. `rows`, in the order of points and
        arms: `point`, `arm`, `seeds` whose training is done, and the summary (below) of its `worst` phase, of its `end`
        and of both `phases`, and, where training left suspects, for each attack the mean of the figures of `suspects`.

        A summary has for each share `mean`, `std` (of the sample, None for one seed) and `by_seed`, and for each attack
        `successes` and `n` of all seeds, their `rate` with its Wilson 95 % interval `ci95`, `by_seed`, and of backdoors
        the same of `clean` images.
    """
    points, rows = {}, []
    for point in dict.fromkeys(corpus.point for corpus in experiment.corpora):
        corpora = [corpus for corpus in experiment.corpora if corpus.point == point]
        points[point] = poison_counts(folder / corpora[0].name / "origin")
        for arm in experiment.arms:
            done = {}
            for corpus in corpora:
                run = folder / corpus.name
                found = read_training(run / arm, corpus.config.train.epochs)
                if found:
                    done[corpus.seed] = {**found, "suspects": suspects(run / arm / SUSPECTS, run / "origin")}
            if done:
                rows.append({"point": point, "arm": arm, **_row(done)})
    return {"points": points, "rows": rows}


def _row(done: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    trainings = list(done.values())
    phases = {
        phase: summarise([training["phases"][phase] for training in trainings])
        for phase in sorted({phase for training in trainings for phase in training["phases"]})
        if all(phase in training["phases"] for training in trainings)
    }
    row = {
        "seeds": list(done),
        "worst": summarise([worst(list(training["phases"].values())) for training in trainings]),
        "end": summarise([training["end"] for training in trainings]),
        "phases": phases,
    }
    ranked = [training["suspects"] for training in trainings if training["suspects"]]
    if ranked:
        row["suspects"] = {
            attack: {figure: statistics.fmean(seed[attack][figure] for seed in ranked) for figure in ranked[0][attack]}
            for attack in ranked[0]
        }
    return row


def read_training(arm: Path, epochs: int) -> dict[str, Any] | None:
    """The evaluations of a finished training: `end`, and `phases`, the last of each phase; None if it is not done.

    A phase that was last seen in the first half of the epochs, as a warm-up is, is not one that a checkpoint is
    taken in: it is left out.
    """
    rows = read_metrics(arm / "evaluations.jsonl")
    if not rows or rows[-1]["epoch"] < epochs:
        return None
    return {"end": rows[-1], "phases": {row["phase"]: row for row in rows if row["epoch"] > epochs / 2}}


def worst(phases: Sequence[Figures]) -> dict[str, Any]:
    """The worse phase: for each share the lowest value, for each attack the evaluation with the highest rate."""
    names = list(dict.fromkeys(name for figures in phases for name in figures.get("attacks") or {}))
    attacks = {
        name: max((view["attacks"][name] for view in phases if name in (view.get("attacks") or {})), key=_rate)
        for name in names
    }
    measured = [key for key in SHARES if all(figures.get(key) is not None for figures in phases)]
    return {**{key: min(figures[key] for figures in phases) for key in measured}, "attacks": attacks}


def summarise(figures: Sequence[Figures]) -> dict[str, Any]:
    """All seeds together: means of shares, pooled counts of attacks."""
    shares = {}
    for key in SHARES:
        if all(seed.get(key) is not None for seed in figures):
            values = [seed[key] for seed in figures]
            std = statistics.stdev(values) if len(values) > 1 else None
            shares[key] = {"mean": statistics.fmean(values), "std": std, "by_seed": values}
    attacks = {}
    for name in dict.fromkeys(name for seed in figures for name in seed.get("attacks") or {}):
        counts = [(seed["attacks"][name]["successes"], seed["attacks"][name]["n"]) for seed in figures]
        successes, n = map(sum, zip(*counts, strict=True))
        by_seed = [{"successes": s, "n": m, "rate": s / m if m else 0.0} for s, m in counts]
        attacks[name] = {**asdict(rate(successes, n)), "by_seed": by_seed}
        clean = [seed["attacks"][name].get("clean") for seed in figures]
        if all(clean):
            pooled = rate(sum(each["successes"] for each in clean), sum(each["n"] for each in clean))
            attacks[name]["clean"] = asdict(pooled)
    return {**shares, "attacks": attacks}


def poison_counts(origin: Path) -> dict[str, Any]:
    """The number of pairs that the origin serves, and the number of poisons of each attack."""
    if not (origin / "poison.parquet").exists():
        return {"pairs": 0, "poisons": {}}
    counts = Counter(pq.read_table(origin / "poison.parquet", columns=["attack"])["attack"].to_pylist())
    pairs = pq.read_metadata(origin / "corpus.parquet").num_rows
    return {"pairs": pairs, "poisons": dict(sorted(counts.items()))}


def suspects(path: Path, origin: Path) -> dict[str, dict[str, float]]:
    """How well a training's suspects separate the poisons of each attack from the clean pairs; empty without either.

    Of each attack `auroc`, `average_precision`, and `fpr_at_tpr_95` and `fpr_at_tpr_100`: the share of clean pairs that are
    suspected as much as the least suspected of 95 % of the poisons, and of all.
    """
    if not path.exists() or not (origin / "poison.parquet").exists():
        return {}
    ranked = pq.read_table(path, columns=["key", "score"])
    truth = pq.read_table(origin / "poison.parquet", columns=["key", "attack"])
    attack_of = dict(zip(truth["key"].to_pylist(), truth["attack"].to_pylist(), strict=True))
    attacks = np.array([attack_of.get(key, "") for key in ranked["key"].to_pylist()])
    scores = ranked["score"].to_numpy()
    results = {}
    for attack in sorted(set(attacks) - {""}):
        chosen = (attacks == attack) | (attacks == "")
        poisoned = attacks[chosen] == attack
        if poisoned.all():
            continue
        results[str(attack)] = {
            "auroc": auroc(scores[chosen], poisoned),
            "average_precision": average_precision(scores[chosen], poisoned),
            "fpr_at_tpr_95": fpr_at_tpr(scores[chosen], poisoned, 0.95),
            "fpr_at_tpr_100": fpr_at_tpr(scores[chosen], poisoned, 1.0),
        }
    return results


def attack_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """All attacks in the rows, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["worst"]["attacks"]))


def _rate(result: Mapping[str, Any]) -> float:
    return result["rate"]
