"""Parses X-Robots-Tag headers: whether a site opts out of being in a training set.

A value is a list of directives, optionally preceded by the crawler that they apply to:

    noai, noimageai                       for everybody
    roclip: noindex                       for us
    otherbot: noai, noindex               not for us, up to the next name
    unavailable_after: Fri, 25 Jun 2027 15:00:00 GMT    a directive with a value, not a crawler

Source: Google's "Robots meta tag, data-nosnippet, and X-Robots-Tag specifications"; `noai`, `noimageai` and `noml` are
conventions of DeviantArt and Mojeek.
"""

import re
from collections.abc import Iterable

OPT_OUT = frozenset({"noai", "noimageai", "noml", "noindex", "noimageindex", "none"})
"""`none` is short for `noindex, nofollow`."""
_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_AGENT = re.compile(r"[a-z0-9*][a-z0-9_./*-]*")


def opt_out_directive(values: Iterable[str], agent: str) -> str:
    """The first directive of these X-Robots-Tag headers that excludes `agent` (in lower case), or ""."""
    return next((found for value in values if (found := _opt_out_directive(value.lower(), agent))), "")


def _opt_out_directive(value: str, agent: str) -> str:
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
