"""Poisons with their ground truth, and the rendered scenes: for evaluation only.

In: images, captions and the `attacks` section. Out: the rows that an attacker would add. The trainer never imports this room.
"""
