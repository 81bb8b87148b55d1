"""Reading data files: JSONL, JSON arrays, Parquet and directories of them as records that say where they stand."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ...base.files import why_no_file
from ...base.json_records import SUFFIXES, UNKNOWN, Record, json_records, plain_suffix
from ...base.messages import BadRecord
from ...errors import DataError
from .columns import read_parquet, read_saved
from .folder import is_saved, train_files

__all__ = ["BadRecord", "SourceSpec", "parse_source", "read_records"]


@dataclass(frozen=True)
class SourceSpec:
    """One source of a mixture: a file or directory, and its share of the tokens relative to the others."""

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


def read_records(path: Path) -> Iterator[Record]:
    """(place, record or the reason why it is bad).

    Of a directory the train split is read. Raises `DataError` if a file is unreadable.
    """
    if reason := why_no_file(path):
        raise DataError(f"{path} {reason}; write its contents to a file")
    if path.is_dir():
        if is_saved(path):
            return read_saved(path)
        return chain.from_iterable(read_records(file) for file in train_files(path))
    if path.suffix.lower() == ".parquet":
        return read_parquet(path)
    if plain_suffix(path) in SUFFIXES or path.suffix.lower() in UNKNOWN:
        return json_records(path)
    raise DataError(
        f"{path}: unknown kind of data file; give a .jsonl, .json (also as .gz) or .parquet file, a directory written "
        "by `datasets`, or one of such files"
    )
