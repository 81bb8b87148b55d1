"""The Triton programs of the choice of a token, and its arithmetic: largest logits, tiles of the vocabulary.

Every float operation rounds by itself: the launches switch fused multiply-adds off (`enable_fp_fusion`), and what
PyTorch computes in float32 or float64 is computed so here, in the same order (`arithmetic`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import arithmetic as a

STRIDE, MULTIPLY_0, MULTIPLY_1 = tl.constexpr(a.STRIDE), tl.constexpr(a.MULTIPLY[0]), tl.constexpr(a.MULTIPLY[1])
DROPPED_BITS, UNIT = tl.constexpr(64 - a.UNIFORM_BITS), tl.constexpr(2.0 ** -(a.UNIFORM_BITS + 1))
BELOW_ONE = tl.constexpr(1 - 2.0**-24)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (tl.constexpr(term) for term in a.LOG_TERMS)
E0, E1, E2, E3, E4, E5 = (tl.constexpr(term) for term in a.EXP_TERMS)
LOG2_HIGH, LOG2_LOW, LOG2_E = tl.constexpr(a.LOG2_HIGH), tl.constexpr(a.LOG2_LOW), tl.constexpr(a.LOG2_E)
ROOT_HALF, WEIGHT_BITS = tl.constexpr(a.ROOT_HALF), tl.constexpr(a.WEIGHT_BITS)
SMALLEST, STEEPEST = tl.constexpr(a.SMALLEST), tl.constexpr(a.STEEPEST)
NO_ID = tl.constexpr(2**30)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * MULTIPLY_0
    x = (x ^ (x >> 27)) * MULTIPLY_1
    return x ^ (x >> 31)


@triton.jit
def _row_word(seed, position):
    """The part of the hash that a row shares."""
    return _mix(_mix(seed.to(tl.uint64) + STRIDE) + position.to(tl.uint64) * STRIDE)


@triton.jit
def _log(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - ROOT_HALF) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    power = exponent.to(tl.float32)
    square = f * f
    y = ((((f * L0 + L1) * f + L2) * f + L3) * f + L4) * f
    y = ((((y + L5) * f + L6) * f + L7) * f + L8) * f * square
    y = y + power * LOG2_LOW
    y = y - square * 0.5
    return (f + y) + power * LOG2_HIGH


@triton.jit
def _gumbel(row_word, ids):
    word = _mix(row_word + (ids + 1).to(tl.uint64) * STRIDE)
    odd = ((word >> DROPPED_BITS) << 1) | 1
    u = tl.minimum(odd.to(tl.int64).to(tl.float32) * UNIT, BELOW_ONE)
    rest = 1.0 - u
    lost = (1.0 - rest) - u
    return 0.0 - _log(0.0 - (_log(rest) + lost))


@triton.jit
def _weight(below):
    x = tl.minimum(below, SMALLEST)
    power = (x * LOG2_E + 0.5).to(tl.int32)
    whole = power.to(tl.float32)
    r = (whole * LOG2_HIGH - x) + whole * LOG2_LOW
    y = ((((r * E0 + E1) * r + E2) * r + E3) * r + E4) * r
    y = (y + E5) * (r * r)
    y = (y + r) + 1.0
    return ((y * 16777216.0).to(tl.int64) << (WEIGHT_BITS - 24)) >> power.to(tl.int64)


@triton.jit
def _inverse(temperature):
    hot = temperature > 0
    steep = tl.minimum(tl.div_rn(1.0, tl.where(hot, temperature, 1.0)), STEEPEST)
    return tl.where(hot, steep, 1.0)


@triton.jit
def _key(x):
    """Bits that are ordered as the numbers are, as uint32; 0 for -infinity, and one for both zeros."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = tl.where(x == 0, 0, bits)
    ordered = tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)
    return tl.where(x == -INFINITY, 0, ordered)


@triton.jit
def _scores(logits, out, ids, vocab):
    """A piece of a row in float32, -infinity for what must not be chosen; pointers are the row's."""
    inside = ids < vocab
    x = tl.load(logits + ids, mask=inside, other=-INFINITY).to(tl.float32)
    if out is not None:
        x = tl.where(tl.load(out + ids, mask=inside, other=0) != 0, -INFINITY, x)
    return x


@triton.jit
def _ids(tile, tiles, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The ids of a tile, ascending: every `tiles`-th chunk, so that frequent neighbours do not share one."""
    lane = tl.arange(0, BLOCK)
    return (lane // CHUNK * tiles + tile) * CHUNK + lane % CHUNK


@triton.jit
def _source(source, row):
    """The row of logits that a choice reads."""
    if source is not None:
        return tl.load(source + row).to(tl.int64)
    return row.to(tl.int64)


@triton.jit
def largest_kernel(
    logits, out, source, largest, best_id, held, vocab, tiles, logits_row, out_row,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):
    """The largest logit of every part of a tile, infinity if one is no number, and the first id of the tile's largest.
    The pool of the row is emptied."""
    row, tile = tl.program_id(0), tl.program_id(1)
    at = _source(source, row)
    logits += at * logits_row
    if out is not None:
        out += at * out_row
    ids = _ids(tile, tiles, BLOCK, CHUNK)
    x = _scores(logits, out, ids, vocab)
    x = tl.where(x != x, INFINITY, x)
    part = tl.max(tl.reshape(x, [PARTS, BLOCK // PARTS]), 1)
    tl.store(largest + (row * tiles + tile) * PARTS + tl.arange(0, PARTS), part)
    tl.store(best_id + row * tiles + tile, tl.min(tl.where(x == tl.max(part, 0), ids, NO_ID), 0))
    if tile == 0:
        tl.store(held + row, 0)


@triton.jit
def _largest(largest, row, number, ALL: tl.constexpr):
    """The largest of a row's `number` parts."""
    part = tl.arange(0, ALL)
    return tl.max(tl.load(largest + row * number + part, mask=part < number, other=-INFINITY), 0)


@triton.jit
def _kth_part(largest, row, number, k, ALL: tl.constexpr, STRIP: tl.constexpr):
    """The k-th largest of a row's parts, -infinity if there are not so many: the k-th token is not below it."""
    part, strip = tl.arange(0, ALL), tl.arange(0, STRIP)
    mine = tl.load(largest + row * number + part, mask=part < number, other=-INFINITY)
    above = tl.zeros([ALL], tl.int32)
    for start in range(0, number, STRIP):
        other = tl.load(largest + row * number + start + strip, mask=start + strip < number, other=-INFINITY)
        above += tl.sum((other[None, :] >= mine[:, None]).to(tl.int32), 1)
    return tl.max(tl.where((above >= k) & (part < number), mine, -INFINITY), 0)


@triton.jit
def tile_kernel(
    logits, out, source, temperature, top_k, top_p, seed, position, largest,
    total, present, held, cut, best_score, best_id, pool_score, pool_id,
    vocab, tiles, per, logits_row, out_row,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, ALL: tl.constexpr, STRIP: tl.constexpr,
    CAP: tl.constexpr, CONFIDENCE: tl.constexpr,
):
    """Of every tile: the sum of its weights, its number of tokens, and its best token by noisy score. Where the row
    truncates instead of that its first min(top_k, CAP) tokens go into the row's pool, in any order, less those that
    are known to be behind the top_k first of the row, and the key of the last of them is kept if it left any out.

    Nothing where temperature 0 takes the largest logit, whatever is cut off behind it.
    """
    row, tile = tl.program_id(0), tl.program_id(1)
    setting = row // per
    high = _largest(largest, row, tiles * PARTS, ALL)
    hot = tl.load(temperature + setting)
    if (high > -INFINITY) & (high < INFINITY) & (CONFIDENCE | (hot > 0)):
        k, p = tl.load(top_k + setting), tl.load(top_p + setting)
        at = row * tiles + tile
        ids = _ids(tile, tiles, BLOCK, CHUNK)
        from_row = _source(source, row)
        logits += from_row * logits_row
        if out is not None:
            out += from_row * out_row
        x = _scores(logits, out, ids, vocab)
        truncates = (k < vocab) | (p < 1)
        few = truncates & (k <= CAP)
        if not few:
            if (p < 1) | CONFIDENCE:
                tl.store(total + at, tl.sum(_weight((high - x) * _inverse(hot)), 0))
            tl.store(present + at, tl.sum((x > -INFINITY).to(tl.int32), 0))
        if truncates:
            keep = tl.minimum(k, CAP).to(tl.int32)
            key = _key(x)
            least = tl.full((), 1, tl.uint32)
            if few:
                least = tl.maximum(_key(_kth_part(largest, row, tiles * PARTS, keep, ALL, STRIP)), least)
            number = tl.sum((key >= least).to(tl.int32), 0)
            if number > 0:
                lowest = least - 1
                if number > keep:
                    most = tl.max(key, 0)
                    while lowest < most:
                        middle = most - (most - lowest) // 2
                        enough = tl.sum((key >= middle).to(tl.int32), 0) >= keep
                        lowest = tl.where(enough, middle, lowest)
                        most = tl.where(enough, most, middle - 1)
                above = key > lowest
                equal = (key == lowest) & (key >= least)
                room = keep - tl.sum(above.to(tl.int32), 0)
                chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
                slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
                first = tl.atomic_add(held + row, tl.minimum(number, keep))
                place = row.to(tl.int64) * (tiles * CAP) + first + slot
                tl.store(pool_score + place, x, mask=chosen)
                tl.store(pool_id + place, ids, mask=chosen)
                if not few:
                    tl.store(cut + at, lowest.to(tl.int64))
            elif not few:
                tl.store(cut + at, 0)
        else:
            score = x
            if hot > 0:  # noise is finite: at T = 0 it adds 0
                word = _row_word(tl.load(seed + setting), tl.load(position + setting) + row % per)
                score = x + hot * _gumbel(word, ids)
            best = tl.max(score, 0)
            tl.store(best_score + at, best)
            tl.store(best_id + at, tl.min(tl.where(score == best, ids, NO_ID), 0))
