"""Checkpoints: saved atomically, verified before they are loaded, named by LATEST and TRUSTED, copied to a store.

In: an engine, the towers and the parts with a state of their own. Out: `step-00000123/` with its SHA256SUMS.
"""
