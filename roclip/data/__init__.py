"""Sealed shards and their manifest, ready-made tars, and the order in which training reads their samples.

In: a folder or store of shards. Out: batches in an order that is a pure function of (snapshot, seed, epoch). `shards.py` is the
format that ingest writes; `order.py` computes a sample's position; `stream.py` is what the training loop reads from.
"""
