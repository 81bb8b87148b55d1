"""The record of an evaluation: what was measured and everything that is needed to measure it again.

`flarec eval CKPT --data FILE --out RECORD.json` writes one, `--repeat RECORD.json` runs with its settings and says
whether the numbers are the same. Names in it are no machine's paths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..base.fields import shown, whole_number
from ..base.files import why_no_file
from ..base.generation import GenerationOptions
from ..base.hashes import sha256_of
from ..errors import FlarecError, UsageError
from .summary import Attempt

KIND, FORMAT_VERSION = "flarec evaluation", 1
SETTINGS = ("samples", "limit", "batch", "execute", "thinking")
NOT_COMPARED = ("seconds",)


def hash_of_data(path: Path) -> str:
    """sha256 of a data file, or of all files of a directory in the order of their names."""
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    return sha256_of(*files)


def to_record(
    identity: Mapping[str, Any], options: GenerationOptions, settings: Mapping[str, Any], result: Mapping[str, Any],
    against: Mapping[str, Any] | None, attempts: Sequence[Attempt],
) -> dict[str, Any]:
    """Plain values. identity: model, data, chat_template, computed_in, versions, as `flarec eval` collects them."""
    options = replace(options, eos_ids=None)  # the model's own, which its hash stands for
    return {
        "record": KIND, "format_version": FORMAT_VERSION, **identity,
        "options": {name: sorted(value) if isinstance(value, frozenset) else value
                    for name, value in asdict(options).items()},
        "settings": dict(settings), "result": dict(result), "against": against,
        "answers": [{**attempt.to_dict(), "text": attempt.text} for attempt in attempts],
    }


def read_record(path: Path, option: str = "--repeat") -> dict[str, Any]:
    """A record that was written before. Raises `UsageError` for a file that is none."""
    if problem := why_no_file(path):
        raise UsageError(f"{option} {path} {problem}; give a file that `flarec eval --out` wrote")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{option} {path} cannot be read ({error.strerror}); give a file that `flarec eval --out` wrote"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{option} {path} is not JSON ({error}); give a file that `flarec eval --out` wrote") from None
    if not isinstance(table, dict) or table.get("record") != KIND:
        raise UsageError(f"{option} {path} is no record of an evaluation; give a file that `flarec eval --out` wrote")
    if table.get("format_version") != FORMAT_VERSION:
        raise UsageError(
            f"{option} {path} has format version {table.get('format_version')!r}; this flarec reads {FORMAT_VERSION}"
        )
    for name in ("model", "data", "options", "settings", "result"):
        if not isinstance(table.get(name), dict):
            raise UsageError(f"{option} {path} has no table {name}; copy the file again")
    return table


def options_of(record: Mapping[str, Any], path: Path) -> GenerationOptions:
    """The generation options of a record. Raises `UsageError` for values that `GenerationOptions` refuses."""
    unknown = sorted(record["options"].keys() - {item.name for item in fields(GenerationOptions)})
    if unknown:
        raise UsageError(f"--repeat {path} has the option {unknown[0]}, which this flarec does not know")
    try:
        return GenerationOptions(**record["options"])
    except FlarecError as error:
        raise UsageError(f"--repeat {path}: {error}") from None


def settings_of(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """samples, limit, batch, execute and thinking (older records have none) of a record, checked."""
    found = {name: record["settings"].get(name) for name in SETTINGS}
    if not isinstance(found["execute"], bool):
        raise UsageError(f"--repeat {path} has execute {shown(found['execute'])} in its settings; give true or false")
    if not (found["thinking"] is None or isinstance(found["thinking"], bool)):
        thinking = shown(found["thinking"])
        raise UsageError(f"--repeat {path} has thinking {thinking} in its settings; give true, false or null")
    for name in ("samples", "batch", *(["limit"] if found["limit"] is not None else [])):
        found[name] = whole_number(f"{name} in --repeat {path}", found[name], UsageError, low=1)
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Numbers of two results that are not the same, in words. Times are not compared."""
    return [
        f"{name} was {json.dumps(before.get(name))} and is now {json.dumps(after.get(name))}"
        for name in (*before, *(name for name in after if name not in before))
        if name not in NOT_COMPARED and before.get(name) != after.get(name)
    ]
