"""Bytes to images to a tar, read back, verified and published.

In: one part of a URL list. Out: a sealed shard with its parquet, index and record in the manifest.
"""
