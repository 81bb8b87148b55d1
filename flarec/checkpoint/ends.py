"""The tokens that end a text: what the files of a checkpoint state, and stating them alike.

`config.json`, `generation_config.json` and the tokenizer each name such tokens, and often not the same. All of them end
a text. In what flarec writes both configurations name all of them, the one that the training data end with first, and
that one is the tokenizer's EOS.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, first_line

GENERATION_CONFIG = "generation_config.json"
_CONFIG, _KEY, _TOKENIZER = "config.json", "eos_token_id", "tokenizer_config.json"


def stated_ends(directory: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text, by any of the files. What a class of transformers has for its default counts where neither
    configuration names one. Raises `CheckpointError` for a file that cannot be read."""
    found = {token for name in (GENERATION_CONFIG, _CONFIG) for token in _stated(_table(directory / name))}
    if not found:
        found = {*_ids(getattr(config, _KEY, None)), *_ids(getattr(config.get_text_config(), _KEY, None))}
    return frozenset([*found, *_ids(getattr(tokenizer, _KEY, None))])


def state_ends(directory: Path, ends: Sequence[int], text: str) -> None:
    """Write `ends`, that of the data first, into the files of a checkpoint that is being written, where they differ.

    text: the first of them as a token, for the tokenizer.
    """
    value: int | list[int] = list(ends) if len(ends) > 1 else ends[0]
    for name in (GENERATION_CONFIG, _CONFIG):
        table = _table(directory / name)
        if name == _CONFIG and not table:
            continue
        if {*_stated(table)} == {*ends} and ends[0] == next(_stated(table)):
            continue
        inner = table.get("text_config")
        if name == _CONFIG and isinstance(inner, dict):
            inner[_KEY] = value
        if not isinstance(inner, dict) or _KEY in table:
            table[_KEY] = value
        _write(directory / name, table)
    path = directory / _TOKENIZER
    table = _table(path)
    known = table.get("eos_token")
    if table and (known.get("content") if isinstance(known, dict) else known) != text:
        _write(path, {**table, "eos_token": text})


def _stated(table: dict[str, Any]) -> Iterator[int]:
    yield from _ids(table.get(_KEY))
    inner = table.get("text_config")
    if isinstance(inner, dict):
        yield from _ids(inner.get(_KEY))


def _ids(value: Any) -> Iterator[int]:
    for token in value if isinstance(value, (list, tuple)) else (value,):
        if type(token) is int and token >= 0:
            yield token


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}; copy the model again") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} cannot be read: it is no JSON object; copy the model again")
    return table


def _write(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
