"""The pictures of a pass, read out of the shards by their numbers."""

from pathlib import Path

import numpy as np

from roclip.data.reader import ShardReader, decode
from roclip.data.shards import Manifest
from roclip.oracle.scan.scan import ScanResult


class ScannedImages:
    """Reads distinct images of a pass again, at the side at which they were looked at."""

    def __init__(self, looked: ScanResult, shards: Path):
        self.looked, self.shards = looked, shards
        self._records = {record.name: record for record in Manifest(shards).records()}
        self._captions_of = looked.captions_of()

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers (n,) to pictures (n, S, S, 3) uint8; each shard is opened once."""
        side = self.looked.size_px
        images = np.empty((len(numbers), side, side, 3), dtype=np.uint8)
        places = [self.looked.places[self._captions_of[number][0]] for number in numbers]
        for name in dict.fromkeys(name for name, _ in places):
            reader = ShardReader(self.shards, self._records[name])
            for row, (shard, sample) in enumerate(places):
                if shard == name:
                    images[row] = decode(reader.image(sample), side)
            reader.close()
        return images
