"""Where the streams part and meet again (`flarec.ops.streams`): their tokens are dimensions of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flarec.ir.spec import CLEAN, LENGTH, NOISY, ROWS
from flarec.ops.streams import add_to_noisy, clean_stream, join_rows, join_streams, noisy_stream

from .values import Axes, Refusal, Tensor, tensor

CURE = "leave it to the pass split-streams"


def _part(stream: str) -> Callable[..., Tensor]:
    def part(x: Any, positions: Any, dim: Any) -> Tensor:
        axes = _axes(x)
        if type(dim) is not int or not 0 <= dim < len(axes) or axes[dim] != (LENGTH,):
            raise Refusal("takes a stream out of something else than the tokens of both", CURE)
        _check_positions(positions, stream)
        return tensor((*axes[:dim], (stream,), *axes[dim + 1 :]), x.dtype)

    return part


def _joined(clean: Any, noisy: Any, dim: Any) -> Tensor:
    first, second = _axes(clean), _axes(noisy)
    fits = type(dim) is int and 0 <= dim < len(first) == len(second)
    if not fits or first[dim] != (CLEAN,) or second[dim] != (NOISY,) or clean.dtype != noisy.dtype:
        raise Refusal("joins something else than clean tokens and noisy tokens", CURE)
    return tensor(_meet(first, second, dim, (LENGTH,)), clean.dtype)


def _joined_rows(clean: Any, noisy: Any, positions: Any) -> Tensor:
    first, second = _axes(clean), _axes(noisy)
    apart = first[:1] == ((ROWS, CLEAN),) and second[:1] == ((ROWS, NOISY),)
    if not apart or len(first) != len(second) or clean.dtype != noisy.dtype:
        raise Refusal("joins something else than clean tokens and noisy tokens", CURE)
    _check_positions(positions, CLEAN)
    return tensor(_meet(first, second, 0, (ROWS, LENGTH)), clean.dtype)


def _added(x: Any, noisy: Any, positions: Any, alpha: Any) -> Tensor:
    first, second = _axes(x), _axes(noisy)
    fits = len(first) > 1 and first[0] == second[0] == (ROWS,) and first[2:] == second[2:] and x.dtype == noisy.dtype
    if not fits or first[1] != (LENGTH,) or second[1] != (NOISY,) or not isinstance(alpha, int | float):
        raise Refusal("adds something else than noisy tokens to those of both streams", CURE)
    _check_positions(positions, NOISY)
    return tensor(first, x.dtype)


def _meet(first: Axes, second: Axes, dim: int, tokens: tuple[str, ...]) -> Axes:
    rest, other = ((*axes[:dim], *axes[dim + 1 :]) for axes in (first, second))
    if rest != other:
        raise Refusal("joins tensors whose tokens do not lie alike", CURE)
    return (*first[:dim], tokens, *first[dim + 1 :])


def _axes(x: Any) -> Axes:
    if not isinstance(x, Tensor):
        raise Refusal("parts or joins something that holds no tokens", CURE)
    return x.axes


def _check_positions(positions: Any, stream: str) -> None:
    if not isinstance(positions, Tensor) or positions.axes != ((ROWS,), (stream,)) or positions.dtype != torch.int64:
        raise Refusal(f"takes the number of {stream} tokens from something else than their positions", CURE)


STREAMS: dict[object, Callable[..., Tensor]] = {
    join_streams: _joined,
    join_rows: _joined_rows,
    add_to_noisy: _added,
    clean_stream: _part(CLEAN),
    noisy_stream: _part(NOISY),
}
"""By function of a graph: (values of its operands) -> value of its result."""
