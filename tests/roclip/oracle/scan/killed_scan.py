"""Looks at shards with a segmenter whose process is killed when it has seen so many images: SHARDS LOOKS AFTER."""

import sys
from pathlib import Path

from rigged import fatal_scorer

from roclip.oracle.scan.saved import SavedScans
from roclip.oracle.scan.scan import scan_shards, scan_side_px

shards, folder, after = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
saved = SavedScans(folder, "rigged", "", scan_side_px(shards))
scan_shards(fatal_scorer(folder.parent / "killed", after), shards, lambda *_: None, saved=saved)
