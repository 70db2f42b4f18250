"""Every key with its type, default, unit and docstring, read from the dataclasses and their source."""

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from roclip.config.config import Config
from roclip.config.deploy import DeployConfig

ENTRY = "N"
"""Stands in a key for the number of a list's entry, counted from 0."""
_SUFFIXES = {
    "_requests_per_s": "requests a second",
    "_bytes": "bytes",
    "_gib": "GiB",
    "_frac": "share, 0 to 1",
    "_pixels": "pixels",
    "_epochs": "epochs",
    "_steps": "steps",
    "_s": "seconds",
}
_UNITS = {
    "data.min_shards": "shards",
    "data.shuffle_buffer": "samples",
    "ingest.image_size": "pixels",
    "ingest.min_image_size": "pixels",
    "ingest.samples_per_shard": "URLs",
    "evaluate.size": "images",
    "evaluate.every": "epochs",
    "pool.size": "pairs",
    "train.epochs": "epochs",
    "train.global_batch_size": "pairs",
    "oracle.trusted": "images",
    "oracle.epochs": "epochs",
    "repair.epochs": "epochs",
    "repair.steps": "steps",
    "repair.batch_size": "pairs",
    "train.grad_accum_steps": "pieces",
    "deploy.memory_gib_per_worker": "GiB",
    "deploy.memory_gib_per_ingest_task": "GiB",
}


@dataclass(frozen=True)
class Key:
    """One key of a config."""

    name: str
    """Dotted, as an override has it."""
    kind: str
    """Type in words."""
    default: Any
    unit: str
    """Empty where there is none."""
    text: str
    """Docstring in one line."""


@dataclass(frozen=True)
class Section:
    """A group of keys."""

    name: str
    """Dotted; empty for the keys at the top."""
    text: str
    """Docstring in one line."""
    keys: tuple[Key, ...]


@cache
def sections() -> tuple[Section, ...]:
    """All sections of a run's config in the order in which they are defined, and last those of a cluster's description."""
    return (*_sections(Config, ""), *_sections(DeployConfig, "deploy"))


@cache
def docstrings(schema: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields, in one line each; a field without one is missing."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    found, field_name = {}, ""
    for node in body.body if isinstance(body, ast.ClassDef) else ():
        if field_name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[field_name] = " ".join(str(node.value.value).split())
        field_name = node.target.id if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else ""
    return found


def unit_of(name: str) -> str:
    """The unit of a key, by its name."""
    last = name.rsplit(".", 1)[-1]
    return _UNITS.get(name) or next((unit for suffix, unit in _SUFFIXES.items() if last.endswith(suffix)), "")


def flattened(content: Any, start: str = "") -> Iterator[tuple[str, Any]]:
    """The values in the content of a YAML file by dotted key; a list is one value."""
    for name, value in content.items():
        key = f"{start}.{name}" if start else str(name)
        if isinstance(value, dict) and key not in {key.name for section in sections() for key in section.keys}:
            yield from flattened(value, key)
        else:
            yield key, value


def _sections(schema: Any, name: str) -> Iterator[Section]:
    hints, texts, keys, inner = get_type_hints(schema), docstrings(schema), [], []
    for item in fields(schema):
        hint, key = hints[item.name], f"{name}.{item.name}" if name else item.name
        if is_dataclass(hint):
            inner.append((hint, key))
            continue
        keys.append(Key(key, _in_words(hint), _default(item), unit_of(key), texts.get(item.name, "")))
        if get_origin(hint) is list:
            inner.append((get_args(hint)[0], f"{key}.{ENTRY}"))
    if keys or not name:
        yield Section(name, " ".join((inspect.getdoc(schema) or "").split()), tuple(keys))
    for hint, key in inner:
        yield from _sections(hint, key)


def _default(item: dataclasses.Field) -> Any:
    if item.default is not MISSING:
        return item.default
    return item.default_factory() if item.default_factory is not MISSING else MISSING


def _in_words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_in_words, inner))
    if origin is dict:
        return f"{{{_in_words(inner[0])}: {_in_words(inner[1])}}}"
    if origin in (list, tuple):
        some = len(inner) != 2 or Ellipsis in inner
        return f"list of {_in_words(inner[0])}" if some else f"[{', '.join(map(_in_words, inner))}]"
    return {bool: "true | false", str: "text", type(None): "null"}.get(hint) or (
        "entries" if is_dataclass(hint) else hint.__name__
    )
