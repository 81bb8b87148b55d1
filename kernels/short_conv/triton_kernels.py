"""Triton kernels of the short convolution on two streams, over the visiting order of `readers`.

Channels are independent, so a program owns a range of them and some steps of the order. Sums are float32 (float64 for
float64 inputs).
"""
# ruff: noqa: RUF005 (Triton has no unpacking in tuples)

from __future__ import annotations

import triton
import triton.language as tl

from . import readers

REAL = tl.constexpr(readers.REAL)
ENTER = tl.constexpr(readers.ENTER)
LEAVE = tl.constexpr(readers.LEAVE)
HISTORY = tl.constexpr(readers.HISTORY)
RESET = tl.constexpr(readers.RESET)
NEAR = tl.constexpr(readers.NEAR)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(z, ROUNDED: tl.constexpr):
    """1 / (1 + exp(-z)); 0 and 1 far out, never NaN for finite z. ROUNDED: the result goes to 16 bits."""
    if z.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-z))
    denominator = 1.0 + tl.exp2(z * -LOG2E)
    if ROUNDED:  # a division costs twice the instructions
        root = tl.rsqrt(denominator)
        return root * root
    return 1.0 / denominator


@triton.jit
def fetch(pointer):
    """Ask for these addresses to be brought into the L2 cache; there is no result to wait for."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointer], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def load_taps(weight, column, valid, weight_channel, weight_tap, WIDTH: tl.constexpr, SUM: tl.constexpr):
    """Weights of lags 0 .. W-1, each [BLOCK]; the weight's last column is lag 0."""
    taps = tl.tuple([])
    for lag in tl.static_range(WIDTH):
        pointer = weight + column * weight_channel + (WIDTH - 1 - lag) * weight_tap
        taps = taps + (tl.load(pointer, mask=valid, other=0.0).to(SUM),)
    return taps


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr):
    """COUNT zero vectors [BLOCK]."""
    vectors = tl.tuple([])
    for _ in tl.static_range(COUNT):
        vectors = vectors + (tl.zeros([BLOCK], SUM),)
    return vectors


@triton.jit(do_not_specialize=["length", "clean_length", "tiles"])
def forward_kernel(
    x,
    weight,
    bias,
    window,
    accepted,
    table,
    y,
    kept,
    length,
    clean_length,
    tiles,
    channels,
    x_row,
    x_token,
    weight_channel,
    weight_tap,
    window_row,
    window_token,
    window_channel,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    EXACT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    """Outputs of STEPS steps x BLOCK channels: y [B, T, C], contiguous.

    window: columns of channels, read from column accepted[row] on (0 without `accepted`); None: zeros. kept
    [B, W-1+Lc, C] receives the window and the raw clean inputs, if not None. EXACT: BLOCK divides the channels.
    """
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    tile = (program // blocks) % tiles
    row = (program // blocks // tiles).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    valid = column < channels
    column = column.to(tl.int64)
    step = tile * STEPS + tl.arange(0, STEPS)
    inside = step < length
    table += row * (WIDTH + 1) * length
    slot = tl.load(table + step * (WIDTH + 1), mask=inside, other=0)
    code = tl.load(table + step * (WIDTH + 1) + 1, mask=inside, other=0)
    real = (code & REAL) != 0
    x += row * x_row
    if window is not None:
        window += row * window_row
        if accepted is not None:
            window += tl.load(accepted + row).to(tl.int64) * window_token

    taps = load_taps(weight, column, valid, weight_channel, weight_tap, WIDTH, SUM)
    total = tl.zeros([STEPS, BLOCK], SUM)
    if bias is not None:
        total += tl.load(bias + column, mask=valid, other=0.0).to(SUM)[None, :]
    for lag in tl.static_range(WIDTH):
        if lag == 0:
            read = tl.where(real, slot, -1)
        else:
            read = tl.load(table + step * (WIDTH + 1) + 1 + lag, mask=inside, other=-1)
        present = (read >= 0)[:, None]
        if not EXACT:
            present = present & valid[None, :]
        value = tl.load(x + read.to(tl.int64)[:, None] * x_token + column[None, :], mask=present, other=0.0)
        if window is not None and lag > 0:
            past = (read <= -2)[:, None]
            pointer = window + (-2 - read).to(tl.int64)[:, None] * window_token + column[None, :] * window_channel
            old = tl.load(pointer, mask=past & valid[None, :], other=0.0).to(x.dtype.element_ty)
            value = tl.where(past, old, value)
        total += taps[lag][None, :] * value.to(SUM)
        if kept is not None and lag == 0:
            place = (row * (WIDTH - 1 + clean_length) + WIDTH - 1 + slot) * channels
            clean = (inside & (slot < clean_length))[:, None] & valid[None, :]
            tl.store(kept + place[:, None] + column[None, :], value, mask=clean)
    if SILU:
        total *= sigmoid(total, x.dtype.element_ty.primitive_bitwidth == 16)
    total = tl.where(real[:, None], total, 0.0)
    stored = inside[:, None]
    if not EXACT:
        stored = stored & valid[None, :]
    place = (row * length + slot) * channels
    tl.store(y + place[:, None] + column[None, :], total.to(y.dtype.element_ty), mask=stored)
    if kept is not None:
        for past_column in tl.static_range(WIDTH - 1):
            old = tl.load(window + past_column * window_token + column * window_channel, mask=valid, other=0.0)
            place = (row * (WIDTH - 1 + clean_length) + past_column) * channels
            tl.store(kept + place + column, old.to(kept.dtype.element_ty), mask=same_mask(tile == 0, valid, False))


@triton.jit
def same_mask(condition, valid, EXACT: tl.constexpr):
    """Mask [BLOCK] of a condition that is the same for all channels (EXACT: all are valid), which leaves loads wide."""
    everywhere = (tl.zeros_like(valid.to(tl.int32)) + condition.to(tl.int32)) != 0
    if EXACT:
        return everywhere
    return everywhere & valid


@triton.jit
def load_step(
    x,
    dy,
    window,
    entry,
    column,
    valid,
    x_token,
    dy_token,
    window_token,
    window_channel,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(slot, code, dy, inputs at lags 0 .. W-1) of a step, vectors [BLOCK] as stored, all zero for padding.

    entry: the step's row of the table.
    """
    slot, code = tl.load(entry), tl.load(entry + 1)
    own = tl.where((code & REAL) != 0, slot, -1)
    inputs = tl.tuple([])
    for lag in tl.static_range(WIDTH):
        read = own if lag == 0 else tl.load(entry + 1 + lag)
        present = same_mask(read >= 0, valid, EXACT)
        value = tl.load(x + read.to(tl.int64) * x_token + column, mask=present, other=0.0)
        if window is not None and lag > 0:
            past = same_mask(read <= -2, valid, False)
            pointer = window + (-2 - read).to(tl.int64) * window_token + column * window_channel
            value = tl.where(past, tl.load(pointer, mask=past, other=0.0).to(x.dtype.element_ty), value)
        inputs = inputs + (value,)
    present = same_mask(own >= 0, valid, EXACT)
    grad = tl.load(dy + slot.to(tl.int64) * dy_token + column, mask=present, other=0.0)
    return slot, code, grad, inputs


@triton.jit
def gradient_of_sum(stored, inputs, taps, offset, WIDTH: tl.constexpr, SILU: tl.constexpr, SUM: tl.constexpr):
    """Gradient [BLOCK] of a token's weighted sum, which is recomputed (the activation's argument)."""
    grad = stored.to(SUM)
    if SILU:
        z = offset
        for lag in tl.static_range(WIDTH):
            z += taps[lag] * inputs[lag].to(SUM)
        s = sigmoid(z, stored.dtype.primitive_bitwidth == 16)
        grad = grad * (s * (1.0 + z * (1.0 - s)))
    return grad


@triton.jit
def through_token(pending, dz, taps, WIDTH: tl.constexpr):
    """(gradient of this token's input, pending gradients of the W-1 tokens before it)"""
    following = tl.tuple([])
    for back in tl.static_range(1, WIDTH):
        share = taps[back] * dz
        if back < WIDTH - 1:
            share += pending[back]
        following = following + (share,)
    return pending[0] + taps[0] * dz, following


@triton.jit
def enter_block(pending, outside, code, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr):
    """Before a token: (pending, outside)"""
    if (code & ENTER) != 0:
        tl.debug_barrier()  # orders nothing: keeps this a branch, which selects in every step would cost more than
        outside = pending
        pending = zeros(WIDTH - 1, BLOCK, SUM)
    return pending, outside


@triton.jit
def leave_block(pending, outside, code, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr):
    """After a token: pending"""
    if (code & (LEAVE | RESET)) != 0:
        tl.debug_barrier()  # as above
        if (code & HISTORY) != 0:
            pending = added(pending, outside, WIDTH)
        elif (code & RESET) != 0:
            pending = zeros(WIDTH - 1, BLOCK, SUM)
        else:
            pending = outside
    return pending


@triton.jit
def added(left, right, WIDTH: tl.constexpr):
    total = tl.tuple([])
    for back in tl.static_range(WIDTH - 1):
        total = total + (left[back] + right[back],)
    return total


@triton.jit
def add_products(sums, dz, inputs, WIDTH: tl.constexpr, SUM: tl.constexpr):
    """sums[lag] + dz * inputs[lag]"""
    following = tl.tuple([])
    for lag in tl.static_range(WIDTH):
        following = following + (sums[lag] + dz * inputs[lag].to(SUM),)
    return following


@triton.jit(do_not_specialize=["length", "regions"])
def backward_kernel(
    x,
    dy,
    weight,
    bias,
    window,
    table,
    starts,
    cached,
    dx,
    partial,
    dwindow,
    length,
    regions,
    channels,
    x_row,
    x_token,
    dy_row,
    dy_token,
    weight_channel,
    weight_tap,
    window_row,
    window_token,
    window_channel,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
    AHEAD: tl.constexpr,
    SECTOR: tl.constexpr,
):
    """Walk the steps of one region for BLOCK channels: dx [B, T, C] of its tokens, its share of the weight's gradient.

    partial [B, regions, W + 1, C]: sums over the region's tokens of dz times the input, in the weight's column order,
    then of dz. dwindow [B, W-1, C] if not None.

    `pending` are the gradients so far of the W-1 tokens before the last one, in its own stream. A block starts from
    zeros while the clean stream's wait `outside`; behind its first token, the tokens before it are the clean ones
    before its anchor, and the two are added.
    """
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    region = (program // blocks) % regions
    row = (program // blocks // regions).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    valid = column < channels
    column = column.to(tl.int64)
    starts += (row * regions + region) * 3
    halo, own, end = tl.load(starts), tl.load(starts + 1), tl.load(starts + 2)
    table += row * (WIDTH + 1) * length
    x += row * x_row
    dy += row * dy_row
    dx += row * length * channels
    if window is not None:
        window += row * window_row

    taps = load_taps(weight, column, valid, weight_channel, weight_tap, WIDTH, SUM)
    offset = tl.zeros([BLOCK], SUM)
    if bias is not None:
        offset += tl.load(bias + column, mask=valid, other=0.0).to(SUM)
    pending = zeros(WIDTH - 1, BLOCK, SUM)
    outside = zeros(WIDTH - 1, BLOCK, SUM)

    for step in range(halo, own):
        entry = table + step * (WIDTH + 1)
        code = tl.load(entry + 1)
        pending, outside = enter_block(pending, outside, code, WIDTH, BLOCK, SUM)
        if (code & NEAR) != 0:
            _, _, grad, inputs = load_step(
                x, dy, window, entry, column, valid, x_token, dy_token, window_token, window_channel, WIDTH, EXACT
            )
            dz = gradient_of_sum(grad, inputs, taps, offset, WIDTH, SILU, SUM)
            _, pending = through_token(pending, dz, taps, WIDTH)
            pending = leave_block(pending, outside, code, WIDTH, BLOCK, SUM)

    dweight = zeros(WIDTH, BLOCK, SUM)
    dbias = tl.zeros([BLOCK], SUM)
    sector = (program % blocks) * BLOCK + tl.arange(0, BLOCK // SECTOR) * SECTOR
    for step in range(own, end):
        if AHEAD > 0:
            later = tl.load(table + tl.minimum(step + AHEAD, end - 1) * (WIDTH + 1)).to(tl.int64)
            fetch(x + later * x_token + tl.minimum(sector, channels - 1))
            fetch(dy + later * dy_token + tl.minimum(sector, channels - 1))
        slot, code, grad, inputs = load_step(
            x, dy, window, table + step * (WIDTH + 1), column, valid,
            x_token, dy_token, window_token, window_channel, WIDTH, EXACT,
        )
        dz = gradient_of_sum(grad, inputs, taps, offset, WIDTH, SILU, SUM)
        dweight = add_products(dweight, dz, inputs, WIDTH, SUM)
        if bias is not None:
            dbias += dz
        pending, outside = enter_block(pending, outside, code, WIDTH, BLOCK, SUM)
        dinput, pending = through_token(pending, dz, taps, WIDTH)
        pending = leave_block(pending, outside, code, WIDTH, BLOCK, SUM)
        pointer = dx + slot.to(tl.int64) * channels + column
        if EXACT:
            tl.store(pointer, dinput.to(dx.dtype.element_ty))
        else:
            tl.store(pointer, dinput.to(dx.dtype.element_ty), mask=valid)

    partial += (row * regions + region) * (WIDTH + 1) * channels
    for lag in tl.static_range(WIDTH):
        tl.store(partial + (WIDTH - 1 - lag) * channels + column, dweight[lag], mask=valid)
    tl.store(partial + WIDTH * channels + column, dbias, mask=valid)
    if dwindow is not None:
        # what is pending before the row's first slot belongs to the window, if the document reaches back so far
        before = tl.load(cached + row)
        dwindow += row * (WIDTH - 1) * channels
        for back in tl.static_range(WIDTH - 1):
            value = tl.where(before > back, pending[back], 0.0).to(dwindow.dtype.element_ty)
            pointer = dwindow + (WIDTH - 2 - back) * channels + column
            tl.store(pointer, value, mask=same_mask(region == 0, valid, False))
