"""Fills shards: a list of URLs becomes WebDataset tars that training may read. No torch, no Ray.

The path of one URL:

    sources.py   it is row R of the list; R says which shard it belongs to and which key it gets
    policy.py    its scheme, and every address it leads to, must be allowed
    fetch.py     img2dataset downloads, decodes, resizes, encodes and hashes it
    fetch.py     image, caption and metadata enter the shard's tar; its fate enters the shard's parquet
    verify.py    the tar is read back as training would; only what can be learned from enters the index
    publish.py   tar, parquet and index move to their final names
    publish.py   last of all the manifest names the shard: from then on, and only then, it exists

Around it: ledger.py says which shard number stands for which rows, same_list.py whether a list is the one that was
ingested before, again.py what is fetched in a later pass, lease.py who may fill a folder, exclusive.py how one of several
writers wins.

`origin.py` is no part of this path: it is a small web server for the demo and the tests.
"""
