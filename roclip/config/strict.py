"""Fills frozen dataclasses from YAML, strictly: an unknown key or a wrong type is an error that says where and what."""

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import omegaconf
from omegaconf import OmegaConf

from roclip.errors import ConfigError

Schema = TypeVar("Schema")


def load(schema: type[Schema], source: str, text: str, overrides: Sequence[str] = ()) -> Schema:
    """An instance of a dataclass from YAML and dotted `key=value` overrides.

    Raises `ConfigError` naming `source` or the override, the key, and the nearest known key.
    """
    merged: Any = OmegaConf.structured(schema)
    try:
        merged = OmegaConf.merge(merged, OmegaConf.create(text))
    except Exception as error:
        raise _explain(schema, source, error) from error
    for override in overrides:
        _, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: expected key=value (such as train.lr=1e-3). Remove spaces around '='.")
        try:
            given = override if value else f"{override}''"  # nothing is the empty text: a shell eats the quotes
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([given]))
        except Exception as error:
            raise _explain(schema, override, error) from error
    _refuse_interpolation(source, OmegaConf.to_container(merged, resolve=False, enum_to_str=True))
    try:
        return _tuples(OmegaConf.to_object(merged))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except omegaconf.errors.OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(f"{source}: {error.__cause__}") from error
        raise _explain(schema, source, error) from error


def dump(value: Any) -> str:
    """A dataclass as YAML, such that `load` gives an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(value))


def positive(section: Any, name: str, *keys: str) -> None:
    for key in keys:
        if getattr(section, key) <= 0:
            raise ConfigError(f"{name}.{key}: expected more than 0, got {getattr(section, key)}.")


def fraction(section: Any, name: str, *keys: str) -> None:
    for key in keys:
        if not 0 <= getattr(section, key) <= 1:
            raise ConfigError(f"{name}.{key}: expected a share from 0 to 1, got {getattr(section, key)}.")


def _refuse_interpolation(source: str, value: Any, key: str = "") -> None:
    """`${oc.env:NAME}` would write what the environment holds into every copy of the config."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_interpolation(source, inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            _refuse_interpolation(source, inner, key)
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"{source}: {key}: expected a plain value, got one with '${{'. Write out what it stands for.")


def _tuples(value: Any) -> Any:
    """OmegaConf turns tuples into lists; turn them back, so that equal configs are equal."""
    if not is_dataclass(value):
        return tuple(value) if isinstance(value, list) else value
    for item in fields(value):
        object.__setattr__(value, item.name, _tuples(getattr(value, item.name)))
    return value


def _explain(schema: type, source: str, error: Exception) -> ConfigError:
    key = getattr(error, "full_key", None) or ""
    message = str(getattr(error, "msg", None) or error).splitlines()[0]
    if isinstance(error, (omegaconf.errors.ConfigKeyError, omegaconf.errors.ConfigAttributeError)) and key:
        near = difflib.get_close_matches(key.split(".")[-1], _known_keys(schema, key), n=1, cutoff=0.5)
        hint = f" Did you mean {'.'.join([*key.split('.')[:-1], near[0]])!r}?" if near else ""
        return ConfigError(f"{source}: unknown key {key!r}.{hint}")
    return ConfigError(f"{source}: {key + ': ' if key else ''}{message}")


def _known_keys(schema: type, key: str) -> list[str]:
    known: Any = schema
    for part in key.split(".")[:-1]:
        if is_dataclass(known):
            known = get_type_hints(known).get(part, schema)
        elif get_origin(known) is dict:
            known = get_args(known)[1]
    return [item.name for item in fields(known)] if is_dataclass(known) else []
