"""What the singular and the plural of a name have in common."""

import re
from functools import cache


@cache
def singular(name: str) -> str:
    """In lower case, without the ending of a plural: watch of Watches, shirt of shirts; dress and bus stay."""
    word = name.lower()
    if re.search(r"(?:ch|sh|x|ss|z)es$", word):
        return word[:-2]
    return word[:-1] if re.search(r"\w{3}(?<!s)s$", word) else word
