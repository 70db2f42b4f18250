"""Ingest on Ray: a list of URLs becomes sealed shards. Read `job.py` first."""
