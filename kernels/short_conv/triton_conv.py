"""Short convolution on two streams in Triton: one launch forward, one backward, one per decode step.

The forward reads x and writes y, the backward reads x and dy and writes dx; nothing else of their size moves. The
backward keeps the inputs only and recomputes the sums before the activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flarec.errors import CaptureError, LayoutError
from flarec.layout import Layout

from .readers import ConvSchedule
from .triton_kernels import backward_kernel, forward_kernel

__all__ = ["ConvSchedule", "step", "step_of_layout", "two_stream"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class ConvLaunch:
    """How one kernel is launched. `steps` x `block`: steps and channels of a program (the backward walks its steps, one
    at a time). `ahead`: how many steps before its use the backward asks for a row."""

    block: int
    steps: int = 1
    warps: int = 1
    ahead: int = 0
    registers: int | None = None


def forward_launch(dtype: torch.dtype, channels: int, *, plain: bool = False) -> ConvLaunch:
    """16 bytes a thread and row: four rows a thread over 512 channels of 16 bits, or one over 256.

    plain: no window. One costs registers, and a decode step has few tokens to spread over the device.
    """
    block, steps = (1024, 8) if plain else (512, 4)
    return ConvLaunch(block=min(block // dtype.itemsize, triton.next_power_of_2(channels)), steps=steps, warps=4)


def backward_launch(dtype: torch.dtype, width: int, channels: int, *, plain: bool = False) -> ConvLaunch:
    """One warp, 16 bytes a thread: it holds 4 W - 2 vectors of sums and taps. 8 bytes where those would not fit.

    plain: no bias, no window. There 168 registers, 12 warps on a multiprocessor, were fastest (H100).
    """
    sixteen = dtype.itemsize == 2
    vector = 4 if sixteen and width > 4 else 16 // dtype.itemsize
    block = min(32 * vector, triton.next_power_of_2(channels))
    return ConvLaunch(block=block, ahead=8, registers=168 if plain and sixteen and width == 4 else None)


def two_stream(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    schedule: ConvSchedule,
    *,
    activation: str | None,
    window: Tensor | None = None,
) -> Tensor:
    """Convolution output [B, C, T] in x's dtype, laid out token-major in memory (`y.transpose(1, 2)` is contiguous).

    x [B, C, T] float16, bfloat16, float32 or float64, weight [C, W], bias [C] or None, window [B, C, W-1] as in
    `reference` (None: zeros); differentiable in all of them. Padding slots output 0, are never read and get gradient 0.
    Sums are float32 (float64 for float64 inputs). x is read in place if its channels are next to each other in memory,
    else it is copied. Raises `CaptureError` for an activation, dtype or shape that the kernel does not know,
    `LayoutError` for a schedule of another batch.
    """
    silu = _check(x, weight, bias, schedule, activation)
    if window is not None and window.shape != (x.shape[0], x.shape[1], schedule.width - 1):
        raise CaptureError(
            f"short_conv needs a window [{x.shape[0]}, {x.shape[1]}, {schedule.width - 1}], not {list(window.shape)}"
        )
    out: Tensor = short_conv_fwd(
        x, weight, bias, window, schedule.table, schedule.starts, schedule.cached, schedule.clean_length, silu
    )
    return out


@torch.no_grad()
def step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    buffer: Tensor,
    accepted: Tensor,
    schedule: ConvSchedule,
    layout_clean_length: int,
    *,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The decode form, one launch: (y [B, C, T], next buffer [B, C, W-1+Lc] in x's dtype, token-major in memory).

    buffer [B, C, W-1+R] of any float dtype: raw inputs before and in the previous step's clean rows, of which accepted
    [B] are committed; the window is its columns accepted .. accepted+W-2. The next buffer is that window and this
    step's raw clean inputs, 0 in padding slots; noisy rows never enter it. No gradients; errors as in `two_stream`.
    """
    silu = _check(x, weight, bias, schedule, activation)
    if layout_clean_length != schedule.clean_length:
        raise LayoutError(
            f"the conv schedule has {schedule.clean_length} clean slots and the layout {layout_clean_length}; derive "
            "the schedule from this layout"
        )
    past = schedule.width - 1
    if buffer.shape[:2] != x.shape[:2] or buffer.shape[2] < past:
        raise CaptureError(
            f"short_conv needs a buffer [{x.shape[0]}, {x.shape[1]}, at least {past}], not {list(buffer.shape)}"
        )
    kept = _token_major(x, x.shape[0], x.shape[1], past + schedule.clean_length)
    y = _forward(x, weight, bias, buffer, accepted, schedule.table, schedule.clean_length, silu, kept=kept)
    return y, kept


def step_of_layout(*, layout: Layout, **operands: Any) -> tuple[Tensor, Tensor]:
    """`step` with a layout for its number of clean slots, as graphs call it."""
    return step(**operands, layout_clean_length=layout.clean_length)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, schedule: ConvSchedule, activation: str | None) -> bool:
    """Whether the activation is SiLU; raises for what the kernels cannot do."""
    if activation not in (None, "silu", "swish"):
        raise CaptureError(f"short_conv has no activation {activation!r}; it knows None, 'silu' and 'swish'")
    if x.dtype not in DTYPES:
        raise CaptureError(f"short_conv has no kernel for {x.dtype}; use the torch kernels")
    if (x.shape[0], x.shape[2]) != (schedule.rows, schedule.length):
        raise LayoutError(
            f"the conv schedule is of {schedule.rows} rows of {schedule.length} tokens, x has {x.shape[0]} of "
            f"{x.shape[2]}; derive it from the layout of this batch"
        )
    if weight.shape != (x.shape[1], schedule.width) or (bias is not None and bias.shape != (x.shape[1],)):
        raise CaptureError(
            f"short_conv needs a weight [{x.shape[1]}, {schedule.width}] and a bias [{x.shape[1]}] or none, not "
            f"{list(weight.shape)} and {None if bias is None else list(bias.shape)}"
        )
    if schedule.device != x.device:
        raise LayoutError(f"the conv schedule is on {schedule.device} and x on {x.device}; move it with .to()")
    return activation is not None


def _token_major(like: Tensor, rows: int, channels: int, tokens: int) -> Tensor:
    """Uninitialised [rows, channels, tokens] whose channels are contiguous."""
    return like.new_empty(rows, tokens, channels).transpose(1, 2)


def _read_in_place(x: Tensor) -> Tensor:
    """x [B, C, T] itself if its channels are next to each other, else a token-major copy."""
    return x if x.stride(1) == 1 else x.transpose(1, 2).contiguous().transpose(1, 2)


def _sum_type(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _strides(window: Tensor | None) -> tuple[int, int, int]:
    """Strides of a window [B, C, W-1] by row, column and channel."""
    return (0, 0, 0) if window is None else (window.stride(0), window.stride(2), window.stride(1))


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Tensor | None,
    accepted: Tensor | None,
    table: Tensor,
    clean_length: int,
    silu: bool,
    *,
    kept: Tensor | None = None,
    launch: ConvLaunch | None = None,
) -> Tensor:
    """Launch `forward_kernel`; `kept` is filled if given. `launch` overrides the choice of `forward_launch`."""
    x = _read_in_place(x)
    rows, channels, length = x.shape
    width = weight.shape[1]
    launch = launch or forward_launch(x.dtype, channels, plain=window is None)
    y = _token_major(x, rows, channels, length)
    tiles = triton.cdiv(length, launch.steps)
    grid = (rows * tiles * triton.cdiv(channels, launch.block),)
    with torch.cuda.device_of(x):
        forward_kernel[grid](
            x, weight, bias, window, accepted, table, y, kept,
            length, clean_length, tiles, channels, x.stride(0), x.stride(2), *weight.stride(), *_strides(window),
            WIDTH=width, SILU=silu, EXACT=channels % launch.block == 0, STEPS=launch.steps, BLOCK=launch.block,
            SUM=_sum_type(x.dtype), num_warps=launch.warps, maxnreg=launch.registers,
        )
    return y


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Tensor | None,
    table: Tensor,
    starts: Tensor,
    cached: Tensor,
    silu: bool,
    *,
    launch: ConvLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, gradients [W + 1, C] of weight and bias, dwindow) by one launch and one sum over its programs."""
    x, dy = _read_in_place(x), _read_in_place(dy)
    rows, channels, length = x.shape
    width = weight.shape[1]
    regions = starts.shape[1]
    plain = bias is None and window is None
    launch = launch or backward_launch(x.dtype, width, channels, plain=plain)
    dx = _token_major(x, rows, channels, length)
    partial = x.new_empty(rows, regions, width + 1, channels, dtype=torch.promote_types(x.dtype, torch.float32))
    dwindow = None if window is None else _token_major(window, rows, channels, width - 1)
    grid = (rows * regions * triton.cdiv(channels, launch.block),)
    with torch.cuda.device_of(x):
        backward_kernel[grid](
            x, dy, weight, bias, window, table, starts, cached, dx, partial, dwindow,
            length, regions, channels, x.stride(0), x.stride(2), dy.stride(0), dy.stride(2), *weight.stride(),
            *_strides(window), WIDTH=width, SILU=silu, EXACT=channels % launch.block == 0, BLOCK=launch.block,
            SUM=_sum_type(x.dtype), AHEAD=0 if triton.knobs.runtime.interpret else launch.ahead,
            SECTOR=min(32 // x.dtype.itemsize, launch.block), num_warps=launch.warps, maxnreg=launch.registers,
        )
    return dx, partial.sum((0, 1)), dwindow


@torch.library.custom_op("flarec::short_conv_fwd", mutates_args=())
def short_conv_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Tensor | None,
    table: Tensor,
    starts: Tensor,
    cached: Tensor,
    clean_length: int,
    silu: bool,
) -> Tensor:
    """`two_stream` with the schedule's tensors as operands."""
    return _forward(x, weight, bias, window, None, table, clean_length, silu)


@short_conv_fwd.register_fake
def _(x, weight, bias, window, table, starts, cached, clean_length, silu):  # type: ignore[no-untyped-def]
    return _token_major(x, *x.shape)


@torch.library.custom_op("flarec::short_conv_bwd", mutates_args=())
def short_conv_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Tensor | None,
    table: Tensor,
    starts: Tensor,
    cached: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and window; empty where the input is None."""
    dx, sums, dwindow = _backward(dy, x, weight, bias, window, table, starts, cached, silu)
    width = weight.shape[1]
    dweight = sums[:width].t().to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    dbias = sums.new_empty(0) if bias is None else sums[width].to(bias.dtype, copy=True)
    return dx, dweight, dbias, sums.new_empty(0) if dwindow is None else dwindow


@short_conv_bwd.register_fake
def _(dy, x, weight, bias, window, table, starts, cached, silu):  # type: ignore[no-untyped-def]
    empty = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    dbias = empty.clone() if bias is None else bias.new_empty(bias.shape)
    dwindow = empty.clone() if window is None else _token_major(window, *window.shape)
    return _token_major(x, *x.shape), weight.new_empty(weight.shape), dbias, dwindow


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, _, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dy):  # type: ignore[no-untyped-def]
    x, weight, bias, window, table, starts, cached = ctx.saved_tensors
    dx, dweight, dbias, dwindow = short_conv_bwd(dy, x, weight, bias, window, table, starts, cached, ctx.silu)
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if window is None else dwindow,
        *(None,) * 5,
    )


short_conv_fwd.register_autograd(_autograd, setup_context=_setup_context)
