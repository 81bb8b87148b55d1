"""Directories of data files as they come from the hub: which files hold the train split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ...base.json_records import SUFFIXES, plain_suffix
from ...errors import DataError

SAVED = ("state.json", "dataset_dict.json")
"""What `datasets` writes beside data that it saved in its own format."""
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_OTHER = ("dataset_info.json", "dataset_infos.json", "config.json", "package.json")


def is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED)


def train_files(path: Path) -> list[Path]:
    """The data files of the train split, in order; all of them if no name says of which split it is.

    A shard (`NAME-00000-of-00002.parquet`) belongs to the split NAME, another file to the one that its name or a folder
    has as a word: the rules of `datasets`. Raises `DataError` for none, and for several subsets.
    """
    found = sorted(_data_files(path))
    if not found:
        raise DataError(
            f"{path}: not a directory written by `datasets`, and no .jsonl, .json or .parquet file is in it; "
            "give a data file"
        )
    splits = {file: _split(file.relative_to(path)) for file in found}
    if not any(splits.values()):
        return found
    train = [file for file, split in splits.items() if split == "train"]
    if not train:
        names = sorted({split for split in splits.values() if split})
        raise DataError(f"{path}: has the splits {', '.join(names)} but no train split; give one split's files")
    folders = sorted({str(file.parent.relative_to(path)) for file in train if _SHARD.fullmatch(_stem(file))})
    if len(folders) > 1:
        raise DataError(f"{path}: has the subsets {', '.join(folders)}; give one of these directories")
    return train


def _data_files(path: Path) -> Iterator[Path]:
    for file in path.rglob("*"):
        hidden = any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
        data = plain_suffix(file) in (*SUFFIXES, ".parquet") and file.name not in _OTHER
        if data and not hidden and file.is_file():
            yield file


def _stem(file: Path) -> str:
    return file.name.split(".")[0]


def _split(file: Path) -> str:
    """The split of a file by its path, empty if nothing says so."""
    if match := _SHARD.fullmatch(_stem(file)):
        return match[1]
    words = {word for part in file.parts for word in re.split(r"[-._ 0-9]+", part.lower())}
    return next((split for split, names in _WORDS.items() if words & {*names}), "")
