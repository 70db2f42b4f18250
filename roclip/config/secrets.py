"""Keeps secrets out of configs, and run directories private to their owner.

A config is copied into run directories, checkpoints, reports, logs and job metadata, so it may contain no secret: a
store's credentials come from the environment or from the role of the node.
"""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from roclip.errors import ConfigError

OWNER_ONLY = 0o700
_USER_INFO = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<user>[^/?#@\s]*)@", re.I)
_SIGNATURE = re.compile(
    r"[?&;](x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|signature|sig|sas|"
    r"(?:access_|auth_|api_?)?(?:token|key)|secret|password|passwd)=",
    re.I,
)
_ACCESS_KEY = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
_WHAT_TO_DO = (
    "A config is copied into checkpoints, reports and logs. Take the secret out: give it to each node by its role, or by "
    "the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_KEY, a file that FSSPEC_CONFIG_DIR "
    "names), and change it, if it was shown to anybody."
)


def refuse_secrets(config: Any) -> None:
    """Raises `ConfigError` for the first text in a dataclass, at any depth, that looks like a secret, without repeating it."""
    for key, text in _texts(config, ""):
        refuse_secret(key, text)


def refuse_secret(name: str, text: str) -> None:
    """Raises `ConfigError` if the value of a key or an option looks like a secret, without repeating it."""
    if found := secret_in(text):
        raise ConfigError(f"{name}: expected no secret, got {found}. {_WHAT_TO_DO}")


def secret_in(text: str) -> str:
    """The kind of secret in a text (a URL with a password or a signature, or an access key), or an empty text."""
    for match in _USER_INFO.finditer(text):
        if ":" in match["user"] or match["scheme"].lower() in ("http", "https"):
            return f"a {match['scheme']}:// URL with credentials before '@'"
    if match := _SIGNATURE.search(text):
        return f"a URL with {match[1]}=…"
    return "an access key" if _ACCESS_KEY.search(text) else ""


def private_directory(path: Path) -> None:
    """Create a folder that only its owner can open. An existing folder keeps its permissions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=OWNER_ONLY, exist_ok=True)


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif is_dataclass(value):
        for item in fields(value):
            yield from _texts(getattr(value, item.name), f"{key}.{item.name}" if key else item.name)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(str(name), key)
            yield from _texts(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{number}]")
