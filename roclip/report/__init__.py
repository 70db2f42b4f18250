"""A run directory, read and drawn: its state, its curves, its pages.

In: the files of a run. Out: `RunState`, `report.html`, and an experiment's tables and figures.
"""

from pathlib import Path

PAGES = Path(__file__).parent
"""Folder of the templates and the stylesheet that all pages share."""
