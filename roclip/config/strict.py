"""Fills frozen dataclasses from YAML, strictly: an unknown, renamed or wrongly typed key is an error that says where and what."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import omegaconf
from omegaconf import OmegaConf

from roclip.config.renamed import old_keys
from roclip.errors import ConfigError

Schema = TypeVar("Schema")


def load(schema: type[Schema], source: str, text: str, overrides: Sequence[str] = ()) -> Schema:
    """Build a dataclass from YAML and dotted `key=value` overrides.

    Raises `ConfigError` that names `source` or the override, and the key, with its new name or the nearest known key.
    """
    merged: Any = OmegaConf.structured(schema)
    try:
        given = OmegaConf.create(text)
        _refuse_old_keys(schema, source, given)
        merged = OmegaConf.merge(merged, given)
    except ConfigError:
        raise
    except Exception as error:
        raise _explain(schema, source, error) from error
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: expected key=value (such as train.lr=1e-3). Remove spaces around '='.")
        try:
            # The quotes of an empty text are eaten by the shell.
            given = OmegaConf.from_dotlist([override if value else f"{override}''"])
            _refuse_old_keys(schema, override, given)
            merged = OmegaConf.merge(merged, _whole_list(merged, key, given))
        except ConfigError:
            raise
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
    """Write a dataclass as YAML from which `load` builds an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(value))


def positive(section: Any, name: str, *keys: str) -> None:
    """Raises `ConfigError` for a key of a section that is not more than 0."""
    for key in keys:
        if getattr(section, key) <= 0:
            raise ConfigError(f"{name}.{key}: expected more than 0, got {getattr(section, key)}.")


def fraction(section: Any, name: str, *keys: str) -> None:
    """Raises `ConfigError` for a key of a section that is not from 0 to 1."""
    for key in keys:
        if not 0 <= getattr(section, key) <= 1:
            raise ConfigError(f"{name}.{key}: expected a share from 0 to 1, got {getattr(section, key)}.")


def _refuse_old_keys(schema: type, source: str, given: Any) -> None:
    told = old_keys(OmegaConf.to_container(given, resolve=False))
    if told := [words for key, words in told.items() if key.split(".")[-1] not in _known_keys(schema, key)]:
        raise ConfigError(f"{source}: {' '.join(told)}")


def _whole_list(merged: Any, key: str, given: Any) -> Any:
    """Turn the override of a list's entry, `attacks.backdoors.0.count=5`, into one of the whole list."""
    place = re.fullmatch(r"(\D+)\.(\d+)(?:\.([^.]+))?", key)
    entries = OmegaConf.select(merged, place[1]) if place else None
    if place is None or not isinstance(entries, omegaconf.ListConfig):
        return given
    content: list[Any] = OmegaConf.to_container(entries, resolve=False)  # pyright: ignore[reportAssignmentType]
    number, value = int(place[2]), OmegaConf.select(given, key)
    if number >= len(content):
        raise ConfigError(
            f"{key}: expected one of the {len(content)} entries, counted from 0. {place[1]}=[…] sets them all."
        )
    content[number] = {**content[number], place[3]: value} if place[3] else value
    whole = OmegaConf.create()
    OmegaConf.update(whole, place[1], content)
    return whole


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
    if isinstance(value, list):
        return tuple(_tuples(inner) for inner in value)
    if is_dataclass(value):
        for item in fields(value):
            object.__setattr__(value, item.name, _tuples(getattr(value, item.name)))
    return value


def _explain(schema: type, source: str, error: Exception) -> ConfigError:
    key = getattr(error, "full_key", None) or ""
    message = str(getattr(error, "msg", None) or error).splitlines()[0]
    if isinstance(error, (omegaconf.errors.ConfigKeyError, omegaconf.errors.ConfigAttributeError)) and key:
        known = _known_keys(schema, key) if "." in key else [*_known_keys(schema, key), *_keys_of_entries(schema)]
        near = difflib.get_close_matches(key.split(".")[-1], known, n=1, cutoff=0.5)
        hint = f" Did you mean {'.'.join([*key.split('.')[:-1], near[0]])!r}?" if near else ""
        return ConfigError(f"{source}: unknown key {key!r}.{hint}")
    return ConfigError(f"{source}: {key + ': ' if key else ''}{message}")


def _known_keys(schema: type, key: str) -> list[str]:
    known: Any = schema
    for part in key.split(".")[:-1]:
        if is_dataclass(known):
            known = get_type_hints(known).get(part.split("[")[0])
        elif get_origin(known) is dict:
            known = get_args(known)[1]
        if get_origin(known) is list:
            known = get_args(known)[0]
    return [item.name for item in fields(known)] if is_dataclass(known) else []


def _keys_of_entries(schema: Any) -> list[str]:
    """The keys of a list's entries, which OmegaConf names without the list."""
    found: list[str] = []
    for hint in get_type_hints(schema).values():
        if get_origin(hint) is list and is_dataclass(get_args(hint)[0]):
            found += [item.name for item in fields(get_args(hint)[0])]
        elif is_dataclass(hint):
            found += _keys_of_entries(hint)
    return found
