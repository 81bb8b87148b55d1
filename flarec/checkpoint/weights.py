"""The weight files of a model directory: which there are, and in which dtypes they hold the tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError, UsageError
from ..frontend.loading import text_name
from ..frontend.source import headers
from ..frontend.source.formats import QUANTISED, SCALES
from ..frontend.source.headers import FLOATS
from ..frontend.source.prefixes import WRAPPINGS, renamed
from .location import resolve

EXTRA = "flarec.safetensors"


def stored_dtypes(path: str | Path, model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype in which the files of a model directory hold each of the model's parameters and buffers, by name.

    Models often keep a few tensors (decay rates, norms) wider than the rest. Names are matched exactly (of text models
    inside wrappers without the prefix), then from the layer index on; tensors without a counterpart get the dtype that
    holds most elements. Quantised weights count as bfloat16.
    """
    found: dict[str, torch.dtype] = {}
    similar: dict[str, torch.dtype] = {}
    elements: Counter[torch.dtype] = Counter()
    narrow = False
    for file in weight_files(resolve(path)):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                piece = opened.get_slice(name)
                kind = piece.get_dtype()
                narrow |= kind in QUANTISED and len(piece.get_shape()) > 1
                dtype = FLOATS.get(kind, torch.bfloat16 if kind in QUANTISED else None)
                if dtype is not None and not name.endswith(SCALES):
                    found[text_name(renamed(name, WRAPPINGS))] = dtype
                    similar.setdefault(_from_layer(name), dtype)
                    elements[dtype] += torch.Size(piece.get_shape()).numel()
    floating = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if not found:  # weights in another format: nothing better is known than what was loaded
        return {name: tensor.dtype for name, tensor in floating.items()}
    usual = torch.bfloat16 if narrow else elements.most_common(1)[0][0]
    return {name: found.get(name, similar.get(_from_layer(name), usual)) for name in floating}


def cast(state: Mapping[str, Tensor], dtype: torch.dtype | Mapping[str, torch.dtype] | None) -> dict[str, Tensor]:
    """The tensors in their dtype on disk. Tied weights stay one tensor: transformers finds ties by their storage."""
    made: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        wanted = dtype.get(name) if isinstance(dtype, Mapping) else dtype
        if wanted is None or not tensor.is_floating_point():
            wanted = tensor.dtype
        key = (tensor.data_ptr(), tensor.shape, wanted)
        if key not in made:
            made[key] = tensor.detach().to(device="cpu", dtype=wanted)
        result[name] = made[key]
    return result


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers loads; some directories hold the weights a second time under other names."""
    try:
        return [path for path in headers.weight_files(directory) if path.is_file()]
    except UsageError as error:
        raise CheckpointError(str(error)) from error


def _from_layer(name: str) -> str:
    match = re.search(r"(?:^|\.)(layers\.\d+\..*)", name)
    return match[1] if match else name
