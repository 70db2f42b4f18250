"""One part of a URL list becomes one shard: fetched, decoded, resized, written to a tar, verified and published.

In: a `Part`. Out: a sealed shard with its parquet, its index and its record in the manifest.
"""
