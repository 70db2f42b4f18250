"""A run directory, read and drawn: its state, its curves, its pages.

In: the files of a run. Out: `RunState`, `report.html`, and an experiment's tables and figures.
"""
