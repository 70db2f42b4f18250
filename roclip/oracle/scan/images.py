"""Reads the pixels of scanned images from their shards."""

from pathlib import Path

import numpy as np

from roclip.data.reader import ShardReader, decode
from roclip.data.shards import Manifest
from roclip.oracle.scan.scan import ScanResult


class ScannedImages:
    """Reads distinct images of a scan by their numbers, at the side in pixels at which they were scanned."""

    def __init__(self, scan: ScanResult, shards: Path):
        self.scan, self.shards = scan, shards
        self._records = {record.name: record for record in Manifest(shards).records()}
        self._caption_rows = scan.caption_rows()

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Return the images with these numbers (n,) as (n, S, S, 3) uint8; each shard is opened once."""
        side = self.scan.size_px
        images = np.empty((len(numbers), side, side, 3), dtype=np.uint8)
        places = [self.scan.places[self._caption_rows[number][0]] for number in numbers]
        for name in dict.fromkeys(name for name, _ in places):
            reader = ShardReader(self.shards, self._records[name])
            for row, (shard, sample) in enumerate(places):
                if shard == name:
                    images[row] = decode(reader.image(sample), side)
            reader.close()
        return images
