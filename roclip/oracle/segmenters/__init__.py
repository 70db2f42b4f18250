"""Segmentation networks as oracles: they say what an image shows and where, and never saw the crawled data.

In: weights or masks from a trusted source. Out: a `Segmenter` that is asked about the labels of a run.
"""
