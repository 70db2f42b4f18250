"""Training: the loop, the losses, the DeepSpeed engine and what happens when a step diverges.

In: a config, an arm and a run directory. Out: checkpoints, `metrics.jsonl` and, from a defended arm, `suspects.parquet`. Read
`loop.py` first. Without Ray: `torchrun -m roclip.training CONFIG`.
"""
