"""Reads X-Robots-Tag: does the site ask not to be in such a data set?

A value is a list of directives, with or without the crawler that they are for:

    noai, noimageai                       for everybody
    roclip: noindex                       for us
    otherbot: noai, noindex               not for us, up to the next name
    unavailable_after: Fri, 25 Jun 2027 15:00:00 GMT    a directive with a value, not a crawler

Source: Google's "Robots meta tag, data-nosnippet, and X-Robots-Tag specifications"; `noai`, `noimageai` and `noml` are customs
of DeviantArt and of Mojeek.
"""

import re
from collections.abc import Iterable

OPT_OUT = frozenset({"noai", "noimageai", "noml", "noindex", "noimageindex", "none"})
"""`none` is short for `noindex, nofollow`."""
_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_AGENT = re.compile(r"[a-z0-9*][a-z0-9_./*-]*")


def objection(values: Iterable[str], agent: str) -> str:
    """The first directive of these X-Robots-Tag headers by which `agent` is to stay away, or "". `agent` is lower case."""
    return next((found for value in values if (found := _objection(value.lower(), agent))), "")


def _objection(value: str, agent: str) -> str:
    ours = True
    for part in value.split(","):
        name, colon, directive = (text.strip() for text in part.partition(":"))
        if not colon:
            directive = name
        elif name in _WITH_VALUE or not _AGENT.fullmatch(name):
            continue
        else:
            ours = name.partition("/")[0] in ("*", agent)
        if ours and directive in OPT_OUT:
            return directive
    return ""
