"""Segmentation networks as oracles: they find labels in images and were never trained on the crawled data.

In: weights or masks from a trusted source. Out: a `Segmenter` for the labels of a run.
"""
