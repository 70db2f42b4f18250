"""Runs ingest and training on Ray: the only package that imports Ray. Read `pipeline.py` first.

In: a config. Out: a run directory with its shards, checkpoints, verdicts and report. `cli/` is the `roclip` command, `ray/`
the session of a run, `ingest/`, `train/` and `oracle/` are the stages, `jobs/`, `doctor/` and `render/` deal with a cluster from
outside, `dashboard/` and `monitoring/` show a run.
"""
