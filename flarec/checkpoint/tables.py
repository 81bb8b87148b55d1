"""The JSON files of a model directory: configurations of the model, of generation and of the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, first_line

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"


def read_table(path: Path) -> dict[str, Any]:
    """A file's object; empty if there is no file. Raises `CheckpointError` for one that cannot be read."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}; copy the model again") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} cannot be read: it is no JSON object; copy the model again")
    return table


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
