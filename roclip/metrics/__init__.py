"""One registry of names, units and reductions. `metrics.jsonl` is the truth; loggers and Prometheus mirror it.

`registry.py` has what a training logs, `series.py` what Prometheus sees, `loggers.py` TensorBoard and Weights & Biases.
"""
