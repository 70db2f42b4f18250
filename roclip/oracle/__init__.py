"""The oracle check: a segmentation network that never saw the crawled data contradicts a poisoned model.

`segmenters.py` what an image shows, `statistics.py` which disagreements chance does not explain, `check.py` one pass over
the shards and the verdict, `report.py` the verdict in pictures. After arXiv:2511.13545, with an oracle trained on masks
instead of a second CLIP, and with a test against trusted images instead of a set difference.
"""
