"""Signals of poisoning over all shards of an ingest, in bounded memory: duplicates, suspicion, drift, quarantine.

In: the parquets of sealed shards. Out: `duplicates.parquet`, `suspicion.parquet`, `drift.parquet`. Signals, not verdicts.
"""
