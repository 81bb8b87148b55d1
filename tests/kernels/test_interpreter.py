"""Triton's interpreter as tests/interpreter.py leaves it still checks what it checked."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled")
LARGEST = torch.iinfo(torch.int32).max


@triton.jit
def products(x_pointer, y_pointer, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    x = tl.load(x_pointer + at)
    tl.store(y_pointer + at, x * 2 + 1)


@pytest.mark.parametrize(("largest", "dtype", "fits"), [
    (LARGEST // 2, torch.int32, True), (LARGEST // 2 + 1, torch.int32, False), (LARGEST // 2 + 1, torch.int64, True),
])
def test_an_integer_that_leaves_its_dtype_is_an_error(largest: int, dtype: torch.dtype, fits: bool) -> None:
    x = torch.tensor([0, 3, -4, largest], dtype=dtype)
    y = torch.zeros_like(x)
    if fits:
        products[(1,)](x, y, COUNT=4)
        assert y.tolist() == [1, 7, -7, 2 * largest + 1]
    else:
        with pytest.raises((InterpreterError, AssertionError), match="int32 overflow detected for operation mul"):
            products[(1,)](x, y, COUNT=4)


@triton.jit
def shapes(x_pointer, y_pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_pointer + rows[:, None] * COLUMNS + columns[None, :])
    tl.static_assert(x.shape[0] == ROWS and x.shape[1] == COLUMNS and x.numel == ROWS * COLUMNS)
    total = tl.sum(x, axis=1)
    tl.static_assert(len(total.shape) == 1 and total.shape[0] == ROWS)
    tl.store(y_pointer + rows, total.to(y_pointer.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_results_know_their_shape_and_dtype(dtype: torch.dtype) -> None:
    x = torch.arange(32, dtype=torch.float32).view(4, 8)
    y = torch.zeros(4, dtype=dtype)
    shapes[(1,)](x, y, ROWS=4, COLUMNS=8)
    assert torch.equal(y, x.sum(1).to(dtype))
