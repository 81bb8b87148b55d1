"""JSON records of a file one by one: a line each (.jsonl, .ndjson, .json) or one array (.json), compressed or not."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import DataError
from .files import why_no_file
from .messages import BadRecord

SUFFIXES = (".jsonl", ".ndjson", ".json")
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNKNOWN = (".zst", ".zip", ".7z", ".lz4", ".tar", ".tgz", ".rar")
COMPRESSED = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zst", b"PK\x03\x04": "zip"}
"""How compressed files begin, and what their names end with."""
MARK = b"\xef\xbb\xbf"  # some editors begin UTF-8 files with it


class Where(NamedTuple):
    """Where a record stands: "data.jsonl, line 3". unit: line, record (of an array) or row (of a table)."""

    file: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


Record = tuple[Where, dict[str, Any] | BadRecord]


def plain_suffix(path: Path) -> str:
    """The suffix that says what a file holds: that before the one of a known compression."""
    return (Path(path.stem) if path.suffix.lower() in OPENERS else path).suffix.lower()


def open_data(path: Path, option: str = "") -> IO[bytes]:
    """A data file for reading, decompressed by its suffix. Raises `DataError`."""
    if reason := why_no_file(path):
        raise DataError(f"{option}{path} {reason}; write its contents to a file")
    if path.suffix.lower() in UNKNOWN:
        raise DataError(f"{option}{path}: {path.suffix} files are not read; decompress it, or compress it with gzip")
    try:
        file: IO[bytes] = OPENERS.get(path.suffix.lower(), open)(path, "rb")
    except OSError as error:
        raise DataError(f"{option}{path}: cannot be read ({error.strerror or error})") from None
    return file


def lines(path: Path, option: str = "") -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a text file, as it is read. Raises `DataError`."""
    try:
        with open_data(path, option) as file:
            for number, line in enumerate(file, 1):
                yield number, line.removeprefix(MARK) if number == 1 else line
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{option}{path}: cannot be read ({why}); copy it again") from None


def json_records(path: Path, option: str = "") -> Iterator[Record]:
    """(place, record or why it is none) of a file. Raises `DataError`.

    A .json file that begins with "[" is one array, and one that begins with "{" and has no whole object in its first
    line is one record; such a file is read as a whole.
    """
    rest = lines(path, option)
    whole, started = plain_suffix(path) == ".json", False
    for number, line in rest:
        if number == 1:
            _check_encoding(line, f"{option}{path}")
        if not line.strip():
            continue
        if whole and (line.lstrip()[:1] == b"[" or isinstance(parse(line), BadRecord)):
            before = b"\n" * (number - 1)  # so that lines keep their numbers
            yield from _whole(before + b"".join([line, *(line for _, line in rest)]), f"{option}{path}")
            return
        record = parse(line)
        if isinstance(record, BadRecord) and not started and line.lstrip()[:1] == b"[":
            raise DataError(f"{option}{path}: begins as a JSON array; call the file .json, or write a record per line")
        if isinstance(record, BadRecord) and not started and line.strip() == b"{" and next(rest, None):
            raise DataError(f"{option}{path}: its first record takes several lines; write each on a line of its own")
        whole, started = False, True
        yield Where(f"{option}{path}", "line", number), record


def _check_encoding(line: bytes, where: str) -> None:
    """Raise `DataError` for a file whose first bytes say that it is no text in UTF-8."""
    kind = next((name for start, name in COMPRESSED.items() if line.startswith(start)), None)
    if kind is not None:
        raise DataError(f"{where}: is compressed with {kind}, and its name does not say so; add .{kind} to it")
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{where}: is UTF-16, not UTF-8 text; convert it (iconv -f UTF-16 -t UTF-8)")


def _whole(text: bytes, where: str) -> Iterator[Record]:
    """The records of what is one JSON value; else of its lines."""
    value, begin = _read(text), text.lstrip().split(b"\n", 1)[0]
    if not isinstance(value, BadRecord):
        for number, item in enumerate(value if isinstance(value, list) else [value], 1):
            yield Where(where, "record", number), _record(item)
    elif begin[:1] == b"[" and isinstance(_read(begin), BadRecord):
        raise DataError(f"{where}: begins as a JSON array and is none: {value}; write it again, or a record per line")
    else:
        for number, line in enumerate(text.split(b"\n"), 1):
            if line.strip():
                yield Where(where, "line", number), parse(line)


def parse(line: bytes) -> dict[str, Any] | BadRecord:
    """The record of a line, whose end is none of its characters: JSON that breaks off there would break off in the
    next line."""
    return _record(_read(line.rstrip(b"\r\n")))


def _read(text: bytes) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        return BadRecord("not UTF-8 text")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return BadRecord(f"not JSON ({error.msg} at {line}column {error.colno})")
    except (RecursionError, ValueError):
        return BadRecord("not JSON that can be read (nested too deeply, or a number with too many digits)")


def _record(value: Any) -> dict[str, Any] | BadRecord:
    if isinstance(value, (dict, BadRecord)):
        return value
    return BadRecord(f"a JSON {type(value).__name__}, not an object")
