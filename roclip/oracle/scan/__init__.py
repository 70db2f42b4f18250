"""The pass over the sealed shards: every distinct image is shown once to the model and once to the oracle.

In: shards, a model, an oracle. Out: observations, kept shard by shard so that a check that was cut off goes on.
"""
