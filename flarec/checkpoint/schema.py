"""What a manifest may hold: every value has its type and its bounds, whoever wrote the file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from ..base.fields import LARGEST, LARGEST_BLOCK, shown
from ..base.generation import MODES, RECHECKED
from ..layout import READOUTS

Check = Callable[[Any], bool]
LARGEST_VOCABULARY = 1 << 31
"""Token ids are below."""
LONGEST_NAME = 1 << 12


def whole(low: int, high: int) -> Check:
    """A whole number within limits; a bool is none."""
    return lambda value: type(value) is int and low <= value <= high


def number(low: float, high: float) -> Check:
    """A finite number within limits; a bool is none."""
    return lambda value: type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def one_of(*values: Any) -> Check:
    return lambda value: isinstance(value, str) and value in values


def optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def table_of(key: Check, value: Check) -> Check:
    return lambda table: isinstance(table, dict) and all(key(name) and value(item) for name, item in table.items())


def text(value: Any) -> bool:
    return isinstance(value, str)


def sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def file_name(value: Any) -> bool:
    """The name of a file in the directory, with `/` between folders; none leaves it."""
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME or "\0" in value or "\\" in value:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() == value and value != "."


def ranges(value: Any) -> bool:
    """Ranges of ids [first, end), ascending, none empty."""
    several = isinstance(value, (list, tuple)) and bool(value)
    if not several or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        return False
    ends = [end for pair in value for end in pair]
    inside = all(type(end) is int and 0 <= end <= LARGEST_VOCABULARY for end in ends)
    return inside and all(a <= b for a, b in pairwise(ends)) and all(first < end for first, end in value)


def settings(value: Any) -> bool:
    """Threshold and recheck of a mode, both of them."""
    both = isinstance(value, dict) and set(value) == {"threshold", "recheck"}
    return both and all(map(number(0.0, 1.0), value.values()))


anything = table_of(text, lambda value: True)
"""A table for readers: nothing is decided by it."""

MANIFEST: dict[str, Check | Mapping[str, Check]] = {
    "source": {"name": text, "sha256": optional(sha256), "licence": optional(text)},
    "mask": {
        "kind": one_of("row", "vector", "random"), "token_id": whole(0, LARGEST_VOCABULARY - 1), "ids": ranges,
    },
    "decode": {
        "block_size": whole(1, LARGEST_BLOCK),
        "readouts": table_of(one_of(*MODES), one_of(*READOUTS)),
        "confidence_threshold": number(0.0, 1.0),
        "denoising_steps": whole(0, LARGEST),
        "recheck": number(0.0, 1.0),
        "drafts": one_of("branches", "single"),
        "chosen": table_of(one_of(*RECHECKED), settings),
    },
    "recipe": anything,
    "pipelines": table_of(text, text),
    "data": anything,
    "metrics": anything,
    "versions": table_of(text, text),
    "plugins": table_of(text, text),
    "adapter": {
        "rank": whole(1, LARGEST),
        "alpha": number(-1e9, 1e9),
        "modules": text,
        "alone": lambda value: type(value) is bool,
    },
}
FILE: Mapping[str, Check] = {"bytes": whole(0, LARGEST), "sha256": sha256}


def problem(table: Mapping[str, Any]) -> str:
    """The first value of a manifest that makes no sense, in words; empty if all do. Missing and unknown keys are the
    reader's business."""
    for name, check in MANIFEST.items():
        if name not in table:
            continue
        value = table[name]
        if callable(check):
            if not check(value):
                return f"{name} is {shown(value)}"
        elif not isinstance(value, dict):
            return f"{name} is {shown(value)}"
        else:
            for key, item in value.items():
                if key in check and not check[key](item):
                    return f"{name}.{key} is {shown(item)}"
    mask = table.get("mask", {})
    if ("ids" in mask) != (mask.get("kind") == "random"):
        return f"mask.ids of the kind {mask.get('kind')} is {shown(mask.get('ids'))}"
    files = table.get("files", {})
    if not isinstance(files, dict):
        return f"files is {shown(files)}"
    for name, entry in files.items():
        if not file_name(name):
            return f"the file name {shown(name)} leaves the directory"
        if not isinstance(entry, dict) or any(key in FILE and not FILE[key](item) for key, item in entry.items()):
            return f"files.{shown(name)} is {shown(entry)}"
    return ""
