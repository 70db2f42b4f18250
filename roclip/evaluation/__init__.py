"""What a checkpoint can do, and what an attacker can make it do.

In: towers and an evaluation set. Out: zero-shot and linear-probe accuracy, retrieval, attack success with 95 % intervals.
"""
