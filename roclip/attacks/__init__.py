"""Poisons and the images that carry them, with their ground truth: for evaluation only.

In: images, captions and the `attacks` section. Out: the rows that an attacker would add. The trainer never imports this room.
"""
