"""Fills shards: a list of URLs becomes WebDataset tars that training may read. No torch, no Ray.

The path of one URL:

    lists/    sources.py            it is row R of the list, and R determines its shard
    http/     policy.py             its scheme, host, port and address, and those of every redirect, are checked
              rate_limiter.py       it waits for a permit of its host; robots.py must allow it
              connection.py         it is fetched, within a deadline and a number of bytes
    shard/    sample_sink.py        its header is checked before it is decoded, then it is hashed
              fetch.py              img2dataset resizes and encodes the image
              tar_writer.py         image, caption and metadata enter the tar, the outcome of the row enters the parquet
              verify.py             the tar is read back as training would; only usable samples enter the index
              publish.py            tar, parquet and index get their final names; last of all the manifest names the
                                    shard: from then on, and only then, it exists
    folder/   ledger.py             which shard number stands for which rows
              lease.py              which ingest may fill a folder
              retries.py            which rows a later pass retries
    signals/  duplicates.py, suspicion.py, drift.py, quarantine.py
                                    search all shards at once when the list has ended, in bounded memory

`origin.py` is a small web server for the demo and the tests. `ingest/README.md` says what all of this guarantees.
"""
