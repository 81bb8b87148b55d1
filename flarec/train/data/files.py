"""Reading data files: JSONL, Parquet and saved `datasets` directories as numbered records."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.files import why_no_file
from ...errors import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")


class BadRecord(ValueError):
    """Why one record cannot be used; the reader adds file and line."""


@dataclass(frozen=True)
class SourceSpec:
    """One source of a mixture: a file or `datasets` directory, and its share of the tokens relative to the others."""

    path: Path
    weight: float = 1.0


def parse_source(text: str) -> SourceSpec:
    """`PATH[:WEIGHT]`: the weight is a number above 0 after the last colon. Raises `DataError`."""
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan|inf)", text)
    path, weight = (match[1], float(match[2])) if match and not os.path.exists(text) else (text, 1.0)
    if not 0 < weight < float("inf"):
        raise DataError(f"--data {text}: the weight {weight:g} is not a number above 0")
    if not os.path.exists(path):  # also for what is too long to be a path
        raise DataError(f"--data {text}: {path} does not exist")
    return SourceSpec(Path(path), weight)


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """(line or row number from 1, record or the reason why it is bad). Raises `DataError` if the file is unreadable."""
    if reason := why_no_file(path):
        raise DataError(f"{path} {reason}; write its contents to a file")
    if path.is_dir():
        return _read_directory(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in JSONL_SUFFIXES:
        return _read_jsonl(path)
    raise DataError(
        f"{path}: unknown kind of data file; give a .jsonl or .parquet file or a directory written by `datasets`"
    )


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parse_line(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _parse_line(line: bytes) -> dict[str, Any] | BadRecord:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return BadRecord("not UTF-8 text")
    except json.JSONDecodeError as error:
        return BadRecord(f"not JSON ({error.msg} at column {error.colno})")
    except (RecursionError, ValueError):
        return BadRecord("not JSON that can be read (nested too deeply, or a number with too many digits)")
    if not isinstance(record, dict):
        return BadRecord(f"a JSON {type(record).__name__}, not an object with messages, prompt and response, or text")
    return record


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    import pyarrow as arrow  # loaded on demand: a JSONL user pays nothing for it
    import pyarrow.parquet as parquet

    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for part in file.iter_batches():
                for record in part.to_pylist():
                    number += 1
                    yield number, record
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error})") from None


def _read_directory(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
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
    for number, record in enumerate(loaded, 1):
        yield number, dict(record)
