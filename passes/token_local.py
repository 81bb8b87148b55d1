"""Is an ATen node token-local? Decided from its symbolic shapes, so it works without weights and without running.

A captured graph keeps the sequence length as a symbol (`flarec.ir.spec`). A node is token-local if its result for one
token depends on that token alone: elementwise ops, views, and ops that reduce, contract or index over dimensions free
of the symbol. Unknown ops count as mixing: better an error that names the op than a leak.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from flarec.ir.program import Program, target_name
from flarec.ir.spec import LENGTH, TensorSpec, holds_tokens

ATEN = torch.ops.aten

ELEMENTWISE = {
    "to",
    "type_as",
    "_to_copy",
    "copy_",
    "clone",
    "contiguous",
    "masked_fill",
    "masked_fill_",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "new_empty",
    "new_zeros",
    "new_ones",
    "zeros",
    "ones",
    "full",
    "empty",
    "scalar_tensor",
    "dropout",
    "div_",
    "mul_",
    "add_",
    "softplus",
    "silu",
    "gelu",
    "log_sigmoid",
    "where",
    "clamp",
    "bitwise_not",
    "sym_size",
    "float",
    "polar",
    "complex",
}
"""Elementwise or constant; ops with torch's own `pointwise` tag need no entry."""

VIEWS = {
    "view",
    "reshape",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "expand",
    "flatten",
    "unflatten",
    "t",
    "_unsafe_view",
    "alias",
    "detach",
    "repeat_interleave",
    "expand_as",
    "view_as",
    "view_as_complex",
    "view_as_real",
}
"""Move or copy elements without combining them; a dimension is never split between tokens by them."""

DIMENSION = {
    "sum": 1,
    "mean": 1,
    "amax": 1,
    "amin": 1,
    "softmax": 1,
    "_softmax": 1,
    "log_softmax": 1,
    "cumsum": 1,
    "topk": 2,
    "sort": 1,
    "slice": 1,
    "select": 1,
    "split": 2,
    "split_with_sizes": 2,
    "chunk": 2,
    "cat": 1,
    "concat": 1,
    "concatenate": 1,
    "stack": 1,
    "gather": 1,
    "scatter": 1,
    "scatter_": 1,
    "scatter_add": 1,
    "index_select": 1,
    "unbind": 1,
    "argmax": 1,
    "max": 1,
    "var": 1,
    "prod": 1,
    "norm": 2,
    "linalg_vector_norm": 2,
    "logsumexp": 1,
    "flip": 1,
    "roll": 2,
    "narrow": 1,
}
"""Ops over a dimension: position of the `dim` argument. The dimension must not hold tokens."""

LAST_DIMENSIONS = {"rms_norm", "layer_norm", "native_layer_norm", "linear"}
CONTRACTIONS = {"matmul", "bmm", "mm", "baddbmm"}


def has_token_dimension(program: Program) -> bool:
    """Whether the sequence length of the capture is a symbol; if it was specialised, tokens cannot be told apart."""
    spec = _spec(program.placeholder("input_ids"))
    return spec is not None and spec.shape[1] == LENGTH


def mixing_reason(node: fx.Node) -> str | None:
    """Why a call node is not token-local, or None if it is."""
    if node.target is operator.getitem or getattr(node.target, "__module__", "") in ("_operator", "math"):
        return None
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return f"calls {target_name(node)}, whose effect on tokens is not known"
    if target._schema.name.startswith("flarec::"):
        return None
    name = target_name(node)
    spec = _spec(node)
    token_dimensions = sum(map(holds_tokens, spec.shape)) if spec is not None else 0
    if token_dimensions > 1:
        return "makes a tensor over pairs of tokens"
    if name == "arange":
        return "reads token slots (arange over the sequence) instead of position_ids" if token_dimensions else None
    if torch.Tag.pointwise in target.tags or name in ELEMENTWISE or name in VIEWS:
        return None
    if name == "embedding" or name in LAST_DIMENSIONS:
        return None if not _holds_last(node) else "contracts over tokens"
    if name in CONTRACTIONS:
        return _contraction(node)
    if name == "repeat":
        return _repeat(node)
    if name in DIMENSION:
        return _dimension(node, name)
    return f"uses {target}, which is not known to be token-local"


def _spec(operand: Any) -> TensorSpec | None:
    spec = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    assert spec is None or isinstance(spec, TensorSpec), f"{operand} has {type(spec).__name__} for a spec"
    return spec


def _holds_last(node: fx.Node) -> bool:
    spec = _spec(node.args[0])
    return spec is not None and bool(spec.shape) and target_name(node) != "embedding" and holds_tokens(spec.shape[-1])


def _repeat(node: fx.Node) -> str | None:
    """Copies along dimensions that hold no tokens are a view."""
    before, times = _spec(node.args[0]), node.args[1]
    assert before is not None and isinstance(times, (list, tuple))
    pairs = zip(reversed(before.shape), reversed(times), strict=False)
    return "repeats tokens" if any(holds_tokens(size) and count != 1 for size, count in pairs) else None


def _contraction(node: fx.Node) -> str | None:
    shapes = [spec.shape for spec in map(_spec, node.args) if spec is not None]
    for shape in shapes[:-1]:
        if holds_tokens(shape[-1]):
            return "contracts over tokens"
    last = shapes[-1] if shapes else ()
    return "contracts over tokens" if len(last) > 1 and holds_tokens(last[-2]) else None


def _dimension(node: fx.Node, name: str) -> str | None:
    position = DIMENSION[name]
    dim: Any = node.kwargs.get("dim", node.args[position] if len(node.args) > position else None)
    source = node.args[0]
    if isinstance(source, (list, tuple)):
        source = source[0]
    spec = _spec(source)
    if spec is None:
        return None  # an operand that an earlier pass made (a gathered row): checked where it was made
    shape = spec.shape
    if dim is None:
        dims: Iterable[int] = (
            range(len(shape))
            if name in ("sum", "mean", "amax", "amin", "max", "prod", "norm")
            else [-1 if name in ("topk", "sort") else 0]
        )
    else:
        dims = dim if isinstance(dim, (list, tuple)) else [dim]
    for index in dims:
        if holds_tokens(shape[index]):
            return f"works along the token dimension ({name})"
    return None
