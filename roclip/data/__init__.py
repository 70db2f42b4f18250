"""Sealed shards and their manifest, other people's tars, and the order in which training reads their samples.

In: a folder or store of shards. Out: batches, whose order is a pure function of (snapshot, seed, epoch). `shards.py` is the
format that ingest writes; `order.py` computes a sample's place; `stream.py` is what the training loop reads from.
"""
