"""The list that a config names. To be replaced by `ingest.sources.open_list`, whose names these are."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from ingest.same_list import rows_sha256
from ingest.sources import Part, read_url_list, split
from roclip.config import Config


class UrlList:
    """A list in memory."""

    def __init__(self, config: Config, path: str | Path):
        source = config.data if config.data.urls else None
        self._table = read_url_list(
            str(path),
            url_col=(source.url_col if source else "") or "url",
            caption_col=source.caption_col if source else "caption",
            limit=source.limit if source else 0,
        )
        self.name = Path(str(path)).name.partition(".")[0] or "list"
        self.rows: int | None = len(self._table)
        self.digest = hashlib.sha256(rows_sha256(self._table, ("url", "caption")).encode()).hexdigest()[:16]
        self.read_frac = 1.0

    def parts(self, samples_per_shard: int, start_row: int = 0) -> Iterator[Part]:
        """The parts from a row on."""
        yield from split(self._table.slice(start_row), samples_per_shard)


def open_list(config: Config, path: str | Path) -> UrlList:
    """The list at `path`: with the columns and the limit of `config.data` where that names a list; one that the embedded
    origin wrote has the columns `url` and `caption` and is taken whole."""
    return UrlList(config, path)
