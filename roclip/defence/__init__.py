"""RoCLIP: which caption each image is trained with, where its own may be poisoned.

In: a batch and its features. Out: the text features of the loss. Read `defence.py` first, then `pool.py`; `search.py` finds
the nearest captions, `neighbours.py` the most similar images, `sample_filter.py` and `suspicion_model.py` say which pairs are
suspected.
"""
