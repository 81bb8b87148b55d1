"""Columnar data: Parquet files, and directories that `datasets` wrote, as records of plain values.

Such files hold every record in one type. A field that a record does not have is null in them, at any depth, and is left
out again; what does not fit into one type stands there as JSON text (`arrow.json`) and is read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...base.json_records import Record, Where
from ...base.messages import BadRecord
from ...errors import DataError

JSON_TYPE = "arrow.json"
Read = Callable[[Any], Any]


def read_parquet(path: Path) -> Iterator[Record]:
    """(place, record) of a file. Raises `DataError`."""
    import pyarrow as arrow  # loaded on demand: a JSONL user pays nothing for it
    import pyarrow.parquet as parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow)
            for part in file.iter_batches():
                for record in part.to_pylist():
                    number += 1
                    yield Where(str(path), "row", number), _plain(record, columns)
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from None


def read_saved(path: Path) -> Iterator[Record]:
    """(place, record) of a directory that `datasets` wrote; of several splits the one named train."""
    import datasets  # loaded on demand: slow to import

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a directory written by `datasets` ({error})") from None
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise DataError(
                f"{path}: has the splits {', '.join(sorted(loaded))} but no train split; give one split's directory"
            )
        loaded = loaded["train"]
    columns, number = _columns(loaded.features.arrow_schema), 0
    for part in loaded.with_format("arrow").iter(batch_size=1000):
        for record in part.to_pylist():
            number += 1
            yield Where(str(path), "row", number), _plain(record, columns)


def _plain(record: dict[str, Any], columns: dict[str, Read]) -> dict[str, Any] | BadRecord:
    try:
        return {key: columns[key](value) for key, value in record.items() if value is not None}
    except ValueError as error:
        return BadRecord(f"holds JSON text that is none ({error})")


def _columns(schema: Any) -> dict[str, Read]:
    return {field.name: _reader(field) for field in schema}


def _reader(field: Any) -> Read:
    """The function from a value of a field, never null, to the plain one."""
    import pyarrow.types as types

    kind = field.type
    named = (field.metadata or {}).get(b"ARROW:extension:name") == JSON_TYPE.encode()
    if named or getattr(kind, "extension_name", None) == JSON_TYPE:
        return json.loads
    if types.is_struct(kind):
        inner = {kind.field(place).name: _reader(kind.field(place)) for place in range(kind.num_fields)}
        return lambda value: {key: inner[key](item) for key, item in value.items() if item is not None}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        read = _reader(kind.value_field)
        return lambda value: [item if item is None else read(item) for item in value]
    if types.is_map(kind):
        entry = _reader(kind.item_field)
        return lambda value: {key: entry(item) for key, item in value if item is not None}
    return lambda value: value
