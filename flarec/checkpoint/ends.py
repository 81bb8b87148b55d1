"""The tokens that end a text: what the files of a checkpoint state, and stating them alike.

`config.json`, `generation_config.json` and the tokenizer each name such tokens, and often not the same. All of them end
a text. In what flarec writes both configurations name all of them, the one that the training data end with first, and
that one is the tokenizer's EOS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .tables import CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, read_table, write_table

_KEY = "eos_token_id"


def stated_ends(directory: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text, by any of the files. What a class of transformers has for its default counts where neither
    configuration names one. Raises `CheckpointError` for a file that cannot be read."""
    found = {token for name in (GENERATION_CONFIG, CONFIG) for token in _stated(read_table(directory / name))}
    if not found:
        found = {*_ids(getattr(config, _KEY, None)), *_ids(getattr(config.get_text_config(), _KEY, None))}
    return frozenset([*found, *_ids(getattr(tokenizer, _KEY, None))])


def state_ends(directory: Path, ends: Sequence[int], text: str) -> None:
    """Write `ends`, that of the data first, into the files of a checkpoint that is being written, where they differ.

    text: the first of them as a token, for the tokenizer.
    """
    value: int | list[int] = list(ends) if len(ends) > 1 else ends[0]
    for name in (GENERATION_CONFIG, CONFIG):
        table = read_table(directory / name)
        if name == CONFIG and not table:
            continue
        if {*_stated(table)} == {*ends} and ends[0] == next(_stated(table)):
            continue
        inner = table.get("text_config")
        if name == CONFIG and isinstance(inner, dict):
            inner[_KEY] = value
        if not isinstance(inner, dict) or _KEY in table:
            table[_KEY] = value
        write_table(directory / name, table)
    path = directory / TOKENIZER_CONFIG
    table = read_table(path)
    known = table.get("eos_token")
    if table and (known.get("content") if isinstance(known, dict) else known) != text:
        write_table(path, {**table, "eos_token": text})


def _stated(table: dict[str, Any]) -> Iterator[int]:
    yield from _ids(table.get(_KEY))
    inner = table.get("text_config")
    if isinstance(inner, dict):
        yield from _ids(inner.get(_KEY))


def _ids(value: Any) -> Iterator[int]:
    for token in value if isinstance(value, (list, tuple)) else (value,):
        if type(token) is int and token >= 0:
            yield token
