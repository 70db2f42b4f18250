"""The oracle check: a segmentation network that never saw the crawled data contradicts a poisoned model.

Read `check.py` first: the verdict. `segmenters.py` says what an oracle is, `opening.py` which there are; `trained.py` is
the one that this project trains, on what `mask_sets.py` reads. `shardpass.py` asks model and oracle about every image of
the shards, `statistics.py` says which disagreements chance does not explain, `report.py` shows them.

After arXiv:2511.13545, with an oracle trained on masks instead of a second CLIP, and with a test against trusted
images instead of a set difference.
"""
