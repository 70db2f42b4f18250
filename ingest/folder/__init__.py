"""The folder of shards: who fills it, which shard stands for which rows, and which rows deserve another pass."""
