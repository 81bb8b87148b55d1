"""The weight files of a model directory and what their headers say: names, dtypes and shapes, no numbers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...errors import UsageError, first_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of plain weights, by the names that safetensors gives them."""
_POINTER = b"version https://git-lfs"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_ONE_MORE = "copy the model again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weight file. dtype: as safetensors writes it (F32, BF16, F8_E4M3, U8 ...)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(directory: Path, named: str | None = None) -> list[Path]:
    """The files that transformers loads, whether they are there or not; empty if none is named.

    named: `transformers_weights` of the configuration. Some directories hold the weights a second time under other
    names. Raises `UsageError` for an index that cannot be read.
    """
    if named and (Path(named).is_absolute() or ".." in Path(named).parts):
        raise UsageError(
            f"transformers_weights = '{named}' in the config.json of {directory} is not in its directory; {_ONE_MORE}"
        )
    first = directory / (named or WEIGHTS)
    if first.name.endswith(".index.json"):
        return _shards(first)
    if named or first.is_file():
        return [first]
    index = directory / INDEX
    return _shards(index) if index.is_file() else []


def read_headers(directory: Path, named: str | None = None) -> dict[str, StoredTensor]:
    """Every tensor that transformers would read from a directory, by name; empty for one without weights.

    Raises `UsageError` for files that are missing, truncated, damaged or no safetensors files, for shards that do not
    belong together, and for a directory whose weights are in files of another kind.
    """
    files = weight_files(directory, named)
    if not files:
        _refuse_other_files(directory)
        return {}
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _tensors(file):
            other = found.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise UsageError(
                    f"{tensor.name} is stored twice, in {other.file.name} and in {file.name} of {directory}: files "
                    f"of two copies are mixed; {_ONE_MORE} into an empty directory"
                )
    if len(files) > 1 or files[0].name != WEIGHTS:
        _check_index(directory / INDEX, found)
    return found


def _shards(index: Path) -> list[Path]:
    return [index.parent / name for name in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file. Names of files that lead elsewhere are refused."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(file) for tensor, file in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{index} cannot be read ({first_line(error)}); {_ONE_MORE}") from error
    for file in names.values():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UsageError(f"{index} names {file}, which is not in its directory; {_ONE_MORE}")
    return names


def _check_index(index: Path, found: dict[str, StoredTensor]) -> None:
    if not index.is_file():
        return
    for name, file in _weight_map(index).items():
        if name not in found:
            raise UsageError(
                f"{index} says that {file} holds {name}, which is not there: the file is of another copy; {_ONE_MORE}"
            )


def _tensors(file: Path) -> Iterator[StoredTensor]:
    if not file.is_file():
        raise UsageError(f"{file} is missing, and the model's weights are in it; {_ONE_MORE}")
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                piece = opened.get_slice(name)
                yield StoredTensor(name, file, piece.get_dtype(), tuple(piece.get_shape()))
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} {_damage(file, error)}") from error


def _damage(file: Path, error: Exception) -> str:
    """What is wrong with a file that cannot be opened, and what to do."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
            length = int.from_bytes(start[:8], "little")
    except OSError as reason:
        return f"cannot be read ({reason.strerror}); {_ONE_MORE}"
    if start == _POINTER:
        return "is a pointer of git-lfs, not the weights; run `git lfs pull` in its directory"
    if start.lstrip()[:1] == b"<":
        return f"is a web page, not the weights: the download failed; {_ONE_MORE}"
    if size < 8 or size < 8 + length < 8 + (100 << 20) or "incomplete" in str(error).lower():
        return f"is truncated ({size:,} bytes are there); {_ONE_MORE}"
    return f"is damaged or no safetensors file ({first_line(error)}); {_ONE_MORE}"


_OTHERS: tuple[tuple[str, str], ...] = (
    (r".*\.gguf", "give it as --gguf {name}"),
    (r"consolidated.*\.safetensors", "it has Mistral's own names; give the directory with model.safetensors"),
    (r".*\.(h5|msgpack|ot|npz)", "it is of another framework; save the model with transformers"),
    (r".*\.(distcp|metadata)|global_step\d+|pytorch_model_fsdp_\d+", "it is a trainer's sharded state; let the trainer "
     "(or `accelerate merge-weights`) write the whole model"),
    (r".*\.(onnx|mlmodel|mlpackage|bin\.xml|tflite)", "it is a compiled model; give the model that it was made from"),
)
"""Files and folders that may hold weights which transformers does not open here -> what to do."""


def _refuse_other_files(directory: Path) -> None:
    names = sorted(path.name for path in directory.iterdir())
    for path in map(directory.joinpath, names):
        if path.suffix == ".safetensors" and not path.exists():
            raise UsageError(f"{path} is a link to {os.readlink(path)}, where nothing is; copy the file itself")
    if shard := next((name for name in names if _SHARD.fullmatch(name)), None):
        raise UsageError(f"{directory} holds {shard} but no {INDEX}, which says what is where; copy that file too")
    for pattern, advice in _OTHERS:
        if name := next((name for name in names if re.fullmatch(pattern, name)), None):
            raise UsageError(
                f"{directory} holds no {WEIGHTS}; its weights are in {name}: {advice.format(name=name)}"
            )
    if name := next((name for name in names if name.endswith(".safetensors") and not _named_apart(name)), None):
        raise UsageError(
            f"{directory} holds no {WEIGHTS}; if {name} has the weights, rename it to {WEIGHTS}"
        )


def _named_apart(name: str) -> bool:
    return name.startswith(("adapter_", "flarec.", "optimizer", "scheduler"))
