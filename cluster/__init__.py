"""Runs ingest and training on Ray: the only room that imports Ray. Read `pipeline.py` first."""
