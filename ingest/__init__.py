"""Fills shards: a list of URLs becomes WebDataset tars that training may read. No torch, no Ray.

The path of one URL:

    sources.py      it is row R of the list; R says which shard it belongs to     formats, json_rows, list_columns, list_files
    connection.py   it is fetched, if policy.py allows the URL and every address  urls, resolver, wire, body, opt_out
    rate_limiter.py        when its host's turn comes, and robots.py lets us             host_table, host_counts
    sample_sink.py         its bytes are judged before they are decoded, then hashed;    images, resize, phash, exif, rows, peer
                    img2dataset resizes and encodes (fetch.py)
    tar_writer.py   image, caption and metadata enter the shard's tar; its fate enters the shard's parquet
    verify.py       the tar is read back as training would; only what can be learned from enters the index
    publish.py      tar, parquet and index move to their final names; last of all the manifest names the shard:
                    from then on, and only then, it exists

Around it: ledger.py says which shard number stands for which rows, same_list.py whether a list is the one that was
ingested before, retries.py what is fetched in a later pass, lease.py who may fill a folder, exclusive.py how one of several
writers wins, outcomes.py why a URL gave nothing.

When the list has ended: duplicates.py, suspicion.py (host topics and templates in signals_text, images and captions in
signals_pairs, patches in shared_patch), quarantine.py and drift.py look at all shards at once, in bounded memory: group_by.py
groups on disk, heavy_hitters.py counts what is too much to be counted.

`origin.py` is no part of this path: it is a small web server for the demo and the tests.
"""
