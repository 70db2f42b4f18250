"""Looks at shards with a segmenter whose process is killed when it has seen so many images: SHARDS LOOKS AFTER."""

import sys
from pathlib import Path

from rigged import fatal_witness

from roclip.oracle.scan.scan import scan_shards, side_of
from roclip.oracle.scan.shard_record import SavedScans

shards, folder, after = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
saved = SavedScans(folder, "rigged", "", side_of(shards))
scan_shards(fatal_witness(folder.parent / "killed", after), shards, lambda *_: None, saved=saved)
