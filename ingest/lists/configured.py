"""The list that a config names."""

from pathlib import Path

from ingest.lists import sources
from ingest.lists.sources import UrlList
from roclip.config import Config


def open_list(config: Config, path: str | Path) -> UrlList:
    """The list at `path`: with the columns and the limit of the config where that names a list; one that the embedded
    origin wrote has the columns `url` and `caption` and is taken whole."""
    if not config.data.urls:
        return sources.open_list(str(path))
    return sources.open_list(
        str(path),
        url_col=config.data.url_col,
        caption_col=config.data.caption_col,
        columns=config.ingest.columns,
        hashes=config.ingest.hash_check != "off",
        limit=config.data.limit,
    )
