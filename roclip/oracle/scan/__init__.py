"""The scan of the sealed shards: model and oracle score every distinct image of a shard once.

In: shards, a model and an oracle. Out: a `ScanResult`. Each shard's part is saved, so that an interrupted check resumes.
"""
