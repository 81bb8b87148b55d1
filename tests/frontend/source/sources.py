"""Copies of one tiny source, each with one thing about it changed."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import tiny_checkpoint

Tensors = dict[str, Tensor]
HIDDEN, ROWS = 64, 512
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
"""Of originals; gone with the process."""


@functools.cache
def original(family: str, tied: bool | None = None) -> Path:
    """Never changed."""
    overrides = {} if tied is None else {"tie_word_embeddings": tied}
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="flarec-tests-"))
    return tiny_checkpoint(Path(_FOLDERS[-1].name), family, **overrides)


def copied(directory: Path, family: str = "qwen3_5_text", tied: bool | None = None) -> Path:
    path = directory / family
    shutil.copytree(original(family, tied), path)
    return path


def configure(path: Path, **values: Any) -> None:
    """Set keys of config.json; ... takes one away."""
    table = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({name: value for name, value in table.items() if value is not ...}))


def rewrite(path: Path, change: Callable[[Tensors], Tensors], name: str = "model.safetensors") -> None:
    tensors = change(load_file(path / name))
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / name, metadata={"format": "pt"})


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(name): value for name, value in tensors.items()}


def added(**more: Tensor) -> Callable[[Tensors], Tensors]:
    """`__` stands for a dot."""
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in more.items()}


def projections(tensors: Tensors) -> list[str]:
    return [name for name in tensors if name.endswith("proj.weight")]


def in_fp8(tensors: Tensors, block: int = 32, scale: str = "_scale_inv") -> Tensors:
    """Projections in e4m3 with a scale per block, as DeepSeek, Qwen and others publish them."""
    result = dict(tensors)
    for name in projections(tensors):
        result[name], result[name + scale] = quantise(tensors[name], block)
    return result


def quantise(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    grid = torch.empty(-(-rows // block), -(-columns // block))
    made = torch.empty_like(weight)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            place = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            grid[i, j] = weight[place].abs().max() / 448
            made[place] = weight[place] / grid[i, j]
    return made.to(torch.float8_e4m3fn), grid


def packed(*companions: str, dtype: torch.dtype = torch.int32, keep: bool = False) -> Callable[[Tensors], Tensors]:
    """Every projection gone (keep: in `dtype`), with tensors of these names in its place."""

    def change(tensors: Tensors) -> Tensors:
        result = {name: value for name, value in tensors.items() if name not in projections(tensors)}
        for name in projections(tensors):
            if keep:
                result[name] = tensors[name][:, ::2].to(dtype)
            for companion in companions:
                result[name.removesuffix("weight") + companion] = torch.ones(4, 4)
        return result

    return change
