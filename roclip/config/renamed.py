"""Keys that configs had before: what each is called now, or what happens instead. Used for presets and overrides."""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "pool.witnesses": "pool.neighbours",
    "pool.gate_frac": "pool.filter_frac",
    "pool.gate_memory": "pool.filter_memory",
    "pool.scout": "pool.suspicion_model",
    "oracle.repair": "repair.enabled",
    "oracle.repair_frac": "repair.set_frac",
    "oracle.repair_stamped_frac": "repair.stamped_frac",
    "oracle.repair_epochs": "repair.epochs",
    "oracle.repair_steps": "repair.steps",
    "oracle.repair_lr": "repair.lr",
    "oracle.repair_batch_size": "repair.batch_size",
    "oracle.repair_hold_weight": "repair.distillation_weight",
    "oracle.repair_in_modal_weight": "repair.in_modal_weight",
    "oracle.repair_push_away_weight": "repair.push_away_weight",
    "train.hold_weight": "repair.distillation_weight (with train.objective=repair)",
    "train.in_modal_weight": "repair.in_modal_weight (with train.objective=repair)",
    "train.push_away_weight": "repair.push_away_weight (with train.objective=repair)",
    "train.unlearn": "repair.triggers",
    "train.finetune": "repair.finetune",
    "attacks.backdoor": "attacks.backdoors, an entry of kind patch",
    "attacks.blended": "attacks.backdoors, an entry of kind blended",
    "attacks.wanet": "attacks.backdoors, an entry of kind wanet",
    "attacks.sig": "attacks.backdoors, an entry of kind sig",
    "attacks.label_consistent": "attacks.backdoors, an entry of kind label_consistent",
}
"""Old key -> what it is called now."""

GONE = {
    "train.push_away_limit": "the limit is always 2.15, as in PAR",
    "pool.exclude_self": "in a matched step an image may find its own caption, as in the paper",
    "augment.caption_static": "augment.preset says it: `paper` edits a caption once, `mild` afresh each epoch",
    "ingest.policy.max_header_bytes": "headers may take 64 KiB",
    "ingest.policy.dns_lookups": "64 lookups run at the same time in one process",
    "cluster.store_memory_bytes": "the object store of a local Ray takes 256 MiB",
    "deploy": "a cluster's description is a file of its own: roclip render TARGET CONFIG --deploy FILE",
}
"""Old key -> what happens instead."""


def old_keys(content: Any) -> dict[str, str]:
    """The old keys in the content of a config, and for each a sentence that says what to do."""
    told = {}
    for key in _paths(content, ""):
        if key in RENAMED:
            told[key] = f"{key} is called {RENAMED[key]} now."
        elif key in GONE:
            told[key] = f"{key} is gone: {GONE[key]}."
    return told


def _paths(content: Any, start: str) -> list[str]:
    found = []
    if isinstance(content, Mapping):
        for name, inner in content.items():
            key = f"{start}.{name}" if start else str(name)
            found += [key, *_paths(inner, key)]
    return found
