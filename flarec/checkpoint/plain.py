"""A source as a plain Hugging Face directory: dequantised, read from a GGUF file, or with an adapter merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, UsageError
from ..frontend.source.formats import SIDE_FILES
from ..frontend.source.gguf import gguf_model, gguf_tokenizer
from .carried import FILE_KINDS
from .directory import Checkpoint, open_checkpoint
from .merging import check_mergeable, merged
from .tables import CONFIG, TOKENIZER_CONFIG, read_table, write_table
from .weights import stored_dtypes
from .write import MAX_SHARD_SIZE, save_model

_OWN = (CONFIG, *SIDE_FILES)


def write_plain_gguf(folder: Path, file: Path) -> None:
    """Write the model of a GGUF file into `folder`, which is made. Raises `UsageError`."""
    tokenizer, model = gguf_tokenizer(file), gguf_model(file)  # what is refused soonest comes first
    model.config.name_or_path = ""
    folder.mkdir()
    save_model(folder, model, None, MAX_SHARD_SIZE)
    tokenizer.save_pretrained(str(folder))
    _drop_invented(folder, int(model.get_input_embeddings().weight.shape[0]))


def _drop_invented(folder: Path, rows: int) -> None:
    """Take tokens out of a tokenizer's files that have no row in the model.

    transformers 5.23 gives every GPT-2 tokenizer of a GGUF file an `<|endoftext|>`, behind the last row if need be.
    """
    path = folder / "tokenizer.json"
    table = read_table(path)
    strange = {item["content"] for item in table["added_tokens"] if item["id"] >= rows}
    if not strange:
        return
    table["added_tokens"] = [item for item in table["added_tokens"] if item["id"] < rows]
    path.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    path = folder / TOKENIZER_CONFIG
    settings = read_table(path)
    settings.pop("added_tokens_decoder", None)
    kept = {name: value for name, value in settings.items() if not isinstance(value, str) or value not in strange}
    write_table(path, kept)


def write_plain(folder: Path, source: str | Path, *, dequantize: bool, adapter: Path | None) -> None:
    """Write a source into `folder`, which is made: plain weights, everything else as it is.

    dequantize: of quantised weights, which become bfloat16; others keep their dtype. adapter: one of peft's, merged.
    Raises `CheckpointError` and `UsageError`.
    """
    if adapter is not None:
        check_mergeable(adapter)
    checkpoint = open_checkpoint(source, dequantize=dequantize)
    if checkpoint.manifest is not None:
        raise CheckpointError(f"{source} is a converted checkpoint, whose weights are plain; give its source")
    if checkpoint.carried(checkpoint.load_model(device="meta")) is not None:
        raise UsageError(
            f"{source} is a multimodal model, whose own files are carried over: its weights cannot be made anew; save "
            "its text model as a model of its own, or use a recipe with an adapter"
        )
    model: Any = checkpoint.load_model(torch.float32)
    dtypes = stored_dtypes(checkpoint.path, model)
    if adapter is not None:
        model = merged(model, adapter)
    model.config.name_or_path = ""
    folder.mkdir()
    _copy_files(checkpoint, folder)
    save_model(folder, model, dtypes, MAX_SHARD_SIZE)


def _copy_files(checkpoint: Checkpoint, folder: Path) -> None:
    for path in sorted(checkpoint.path.iterdir()):
        known = path.suffix in FILE_KINDS or path.name == "README.md"
        left = path.name in _OWN or path.name.endswith(".index.json") or path.name.startswith("adapter_")
        if path.is_file() and known and not left:
            shutil.copyfile(path, folder / path.name)
