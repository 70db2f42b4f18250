"""The folder of shards: the lease of its one writer, the ledger of shard numbers and rows, retries, and reading sealed shards."""
