"""Chooses a list's columns (URLs, captions, extra values, expected hashes) and converts them to the types of the parts."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from ingest.lists.files import ListFile
from ingest.lists.json_rows import NESTED
from roclip.errors import UrlListError

URL_COLUMNS = ("url", "URL", "image_url")
CAPTION_COLUMNS = ("caption", "TEXT", "text")
HASHES = ("md5", "sha256", "phash")
"""Matched in any case. Column `md5` becomes `expected_md5`, and so on."""
TAKEN = frozenset(
    (
        *("url", "caption", "key", "status", "error_message", "width", "height", "original_width", "original_height"),
        *("exif", "md5", "sha256", "sha512", "phash", "flags"),
        *("expected_md5", "expected_sha256", "expected_phash"),
    )
)
"""Column names that a shard's parquet uses itself. An extra column of the list with such a name is stored as `PREFIX` + name."""
PREFIX = "list_"
_HEX = re.compile(r"[0-9a-fA-F]{1,16}")


@dataclass(frozen=True)
class Column:
    """One column of the parts."""

    name: str
    source: str | None
    """Its name in the files; None for the captions of a list of txt files."""
    type: pa.DataType
    convert: Callable[[pa.Array], pa.Array]


@dataclass(frozen=True)
class Columns:
    """The columns of the parts: `url`, `caption`, then extra columns, then expected hashes."""

    columns: tuple[Column, ...]

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([(column.name, column.type) for column in self.columns])

    @property
    def sources(self) -> list[str]:
        """The columns to read from a file, the URLs first."""
        return list(dict.fromkeys(column.source for column in self.columns if column.source is not None))

    def conform(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Convert rows of a file to rows of a part. Missing URLs and captions become "", other missing values null."""
        arrays = []
        for column in self.columns:
            at = -1 if column.source is None else batch.schema.get_field_index(column.source)
            found = batch.column(at) if at >= 0 else pa.nulls(len(batch))  # a txt has only URLs
            arrays.append(column.convert(found))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def choose_columns(
    files: Sequence[tuple[ListFile, pa.Schema]],
    *,
    url_col: str = "",
    caption_col: str = "caption",
    carried: Sequence[str] = (),
    hashes: bool = True,
) -> Columns:
    """Choose the columns of a list from the schemas of its files. The first file's column names hold for all. A txt has URLs
    only.

    A column whose type differs between files gets a type that can hold all of them. Values without a JSON type (times,
    decimals, bytes) are stored as text, and so are the lists and objects of json and jsonl.

    Args:
        files: The files with their schemas.
        url_col: Column of the URLs; "" takes the first of `URL_COLUMNS`.
        caption_col: Column of the captions; if missing, the first of `CAPTION_COLUMNS`.
        carried: Extra columns to keep.
        hashes: Whether to keep the hash columns.

    Raises `UrlListError` for a column that is missing, duplicated, or of an unusable type.
    """
    tables = [(file, schema) for file, schema in files if file.format != "txt"]
    if carried and len(tables) < len(files):
        txt = next(file for file, _ in files if file.format == "txt")
        raise UrlListError(
            f"{txt}: expected the columns {', '.join(carried)} of ingest.columns, but a txt has URLs only. Give it as csv."
        )
    if not tables:
        return Columns((_text_column("url", url_col or URL_COLUMNS[0]), _text_column("caption", None)))
    file, first = tables[0]
    url = _find(file, first.names, [url_col] if url_col else [*URL_COLUMNS], "data.url_col")
    names = [name for name in dict.fromkeys((caption_col, *CAPTION_COLUMNS)) if name]
    caption = _find(file, first.names, names, "data.caption_col")
    columns = [_text_column("url", url), _text_column("caption", caption)]
    for name in dict.fromkeys(carried):
        _find(file, first.names, [name], "ingest.columns")
        kind = _common_type(tables, name)
        columns.append(Column(PREFIX + name if name in TAKEN else name, name, kind, _caster(kind)))
    if hashes:
        found = {name.lower(): name for name in reversed(first.names)}
        columns += [_hash_column(name, found[name]) for name in HASHES if name in found]
    if len({column.name for column in columns}) < len(columns):
        duplicate = next(name for name in carried if PREFIX + name in carried)
        raise UrlListError(
            f"ingest.columns: {duplicate} would be stored as {PREFIX}{duplicate}, which is another column. Leave one out."
        )
    chosen = Columns(tuple(columns))
    for file, schema in tables:
        _check(file, schema, chosen)
    return chosen


def _find(file: ListFile, names: list[str], wanted: list[str], key: str) -> str:
    for name in wanted:
        if name in names:
            return name
    close = difflib.get_close_matches(wanted[0].lower(), [name.lower() for name in names], 1)
    suggestion = next((f" Did you mean {name}?" for name in names if name.lower() in close), "")
    raise UrlListError(
        f"{file}: expected a column {' or '.join(wanted)}, got {', '.join(names) or 'none'}.{suggestion} Set {key}."
    )


def _check(file: ListFile, schema: pa.Schema, chosen: Columns) -> None:
    for column in chosen.columns:
        if column.source is None or column.source not in schema.names:
            raise UrlListError(
                f"{file}: expected the columns of the list's first file, but {column.source} is missing; it has "
                f"{', '.join(schema.names) or 'none'}. Give files of one list the same columns."
            )
        if schema.names.count(column.source) > 1:
            raise UrlListError(f"{file}: expected one column {column.source}, got two of that name. Rename one.")
        kind = schema.field(column.source).type
        if column.name == "url" and not _is_text(kind):
            raise UrlListError(f"{file}: expected text in the column {column.source}, got {kind}. Set data.url_col.")
        try:
            carried = column.name not in ("url", "caption")
            column.convert(pa.nulls(0, pa.string() if carried and kind == NESTED else kind))
        except pa.ArrowException as error:
            raise UrlListError(
                f"{file}: expected values in the column {column.source} that convert to {column.type}, got "
                f"{'lists or objects' if kind == NESTED else kind}. Choose another column, or convert this one."
            ) from error


def _text_column(name: str, source: str | None) -> Column:
    return Column(name, source, pa.string(), _filled_text)


def _hash_column(name: str, source: str) -> Column:
    if name == "phash":
        return Column(f"expected_{name}", source, pa.uint64(), _phash)
    size = {"md5": 16, "sha256": 32}[name]
    return Column(f"expected_{name}", source, pa.string(), lambda array: _digest(array, size))


def _common_type(tables: Sequence[tuple[ListFile, pa.Schema]], name: str) -> pa.DataType:
    """The type that can hold a column's values in all files."""
    kind: pa.DataType = pa.null()
    for file, schema in tables:
        file_type = _stored_type(schema.field(name).type) if name in schema.names else kind
        try:
            kind = pa.unify_schemas(
                [pa.schema([(name, kind)]), pa.schema([(name, file_type)])], promote_options="permissive"
            ).types[0]
        except pa.ArrowException as error:
            raise UrlListError(
                f"{file}: expected {kind} in the column {name}, as in the files before, got {file_type}. Convert one of "
                "them, or leave it out of ingest.columns."
            ) from error
    return pa.string() if types.is_null(kind) else kind


def _stored_type(kind: pa.DataType) -> pa.DataType:
    """The type that a column is stored with."""
    if types.is_dictionary(kind):
        return _stored_type(kind.value_type)
    if types.is_null(kind):
        return kind
    return kind if _is_json_type(kind) and kind != NESTED and not _is_text(kind) else pa.string()


def _is_json_type(kind: pa.DataType) -> bool:
    """Whether JSON can represent these values."""
    if types.is_struct(kind):
        return all(_is_json_type(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json_type(kind.value_type)
    number = types.is_integer(kind) or types.is_floating(kind)
    return number or types.is_boolean(kind) or types.is_string(kind) or types.is_large_string(kind)


def _is_text(kind: pa.DataType) -> bool:
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return (
        types.is_null(kind)
        or _is_bytes(kind)
        or any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view))
    )


def _is_bytes(kind: pa.DataType) -> bool:
    kinds = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(is_kind(kind) for is_kind in kinds)


def _caster(kind: pa.DataType) -> Callable[[pa.Array], pa.Array]:
    return _text if kind == pa.string() else lambda array: _decoded(array).cast(kind, safe=False)


def _decoded(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if types.is_dictionary(array.type) else array


def _filled_text(array: pa.Array) -> pa.Array:
    texts = _text(array)
    return pc.fill_null(texts, "") if texts.null_count else texts


def _text(array: pa.Array) -> pa.Array:
    """Values as text. Invalid UTF-8, which a parquet may label as a string, is replaced."""
    array = _decoded(array)
    if not _is_text(array.type):
        return array.cast(pa.string())
    try:
        if array.type == pa.string():
            array.validate(full=True)  # includes a check for UTF-8
            return array
        return array.cast(pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        values = array.cast(pa.binary()).to_pylist()
        texts = [None if value is None else value.decode("utf-8", "replace") for value in values]
        return pa.array(texts, pa.string())


def _digest(array: pa.Array, size_bytes: int) -> pa.Array:
    """Digests as lower-case hex, from hex digits or bytes; null if missing."""
    array = _decoded(array)
    if not _is_text(array.type):
        raise pa.ArrowTypeError(f"not digests: {array.type}")
    if _is_bytes(array.type):
        values = array.to_pylist()
        array = pa.array([value.hex().encode() if value and len(value) == size_bytes else value for value in values])
    texts = [(text or "").strip().lower() or None for text in _text(array).to_pylist()]
    return pa.array(texts, pa.string())


def _phash(array: pa.Array) -> pa.Array:
    """64-bit perceptual hashes, from integers or hex digits; null if missing."""
    array = _decoded(array)
    if types.is_integer(array.type):
        return array.cast(pa.uint64(), safe=False)
    if not _is_text(array.type):
        raise pa.ArrowTypeError(f"not perceptual hashes: {array.type}")
    return pa.array(
        [int(text, 16) if text and _HEX.fullmatch(text) else None for text in _text(array).to_pylist()], pa.uint64()
    )
