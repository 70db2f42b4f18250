"""Training: the loop, the losses, the DeepSpeed engine, and the handling of steps that diverge.

In: a config, an arm and a run directory. Out: checkpoints, `metrics.jsonl` and, from a defended arm, `suspects.parquet`. Read
`loop.py` first. Without Ray: `torchrun -m roclip.training CONFIG`.
"""
