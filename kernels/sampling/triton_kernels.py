"""The Triton programs of the choice of a token: largest logit, tiles of the vocabulary, rows.

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
def largest_kernel(logits, out, largest, vocab, tiles, logits_row, out_row, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The largest logit of every tile; infinity if one is no number."""
    row, tile = tl.program_id(0), tl.program_id(1)
    logits += row.to(tl.int64) * logits_row
    if out is not None:
        out += row.to(tl.int64) * out_row
    x = _scores(logits, out, _ids(tile, tiles, BLOCK, CHUNK), vocab)
    x = tl.where(x != x, INFINITY, x)
    tl.store(largest + row * tiles + tile, tl.max(x, 0))


@triton.jit
def _largest(largest, row, tiles, TILES: tl.constexpr):
    tile = tl.arange(0, TILES)
    return tl.max(tl.load(largest + row * tiles + tile, mask=tile < tiles, other=-INFINITY), 0)


@triton.jit
def tile_kernel(
    logits, out, temperature, top_k, top_p, seed, position, largest,
    total, present, kept, cut, best_score, best_id, pool_score, pool_id,
    vocab, tiles, logits_row, out_row,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr, CAP: tl.constexpr, CONFIDENCE: tl.constexpr,
):
    """Of every tile: the sum of its weights, its number of tokens, and its best token by noisy score; where the row
    truncates instead of that its first min(top_k, CAP) tokens, and the key of the last of them if it left any out."""
    row, tile = tl.program_id(0), tl.program_id(1)
    at = row * tiles + tile
    high = _largest(largest, row, tiles, TILES)
    if (high > -INFINITY) & (high < INFINITY):
        hot, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
        ids = _ids(tile, tiles, BLOCK, CHUNK)
        logits += row.to(tl.int64) * logits_row
        if out is not None:
            out += row.to(tl.int64) * out_row
        x = _scores(logits, out, ids, vocab)
        if (p < 1) | CONFIDENCE:
            tl.store(total + at, tl.sum(_weight((high - x) * _inverse(hot)), 0))
        number = tl.sum((x > -INFINITY).to(tl.int32), 0)
        tl.store(present + at, number)
        if (k < vocab) | (p < 1):
            keep = tl.minimum(k, CAP).to(tl.int32)
            key = _key(x)
            lowest = tl.full((), 0, tl.uint32)
            if number > keep:
                most = tl.max(key, 0)
                while lowest < most:
                    middle = most - (most - lowest) // 2
                    enough = tl.sum((key >= middle).to(tl.int32), 0) >= keep
                    lowest = tl.where(enough, middle, lowest)
                    most = tl.where(enough, most, middle - 1)
            above = key > lowest
            equal = (key == lowest) & (key > 0)
            room = keep - tl.sum(above.to(tl.int32), 0)
            chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
            slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
            place = row.to(tl.int64) * (tiles * CAP) + tile * keep + slot
            tl.store(pool_score + place, x, mask=chosen)
            tl.store(pool_id + place, ids, mask=chosen)
            tl.store(kept + at, tl.minimum(number, keep))
            tl.store(cut + at, lowest.to(tl.int64))
        else:
            score = x
            if hot > 0:  # noise is finite: at T = 0 it adds 0
                score = x + hot * _gumbel(_row_word(tl.load(seed + row), tl.load(position + row)), ids)
            best = tl.max(score, 0)
            tl.store(best_score + at, best)
            tl.store(best_id + at, tl.min(tl.where(score == best, ids, NO_ID), 0))


@triton.jit
def _piece(full, start, size, logits, out, pool_score, pool_id, kept, vocab, keep, BLOCK: tl.constexpr):
    """(scores, ids) of a piece of the row, or of its pool; -infinity where there is nothing. Pointers are the row's."""
    place = start + tl.arange(0, BLOCK)
    if full > 0:
        x, ids = _scores(logits, out, place, vocab), place
    else:
        held = place < size
        held = held & (place % keep < tl.load(kept + place // keep, mask=held, other=0))
        x = tl.load(pool_score + place, mask=held, other=-INFINITY)
        ids = tl.load(pool_id + place, mask=held, other=0)
    return x, ids


@triton.jit
def _is_kept(x, ids, lowest, last):
    """Whether tokens are among the first: the last one has the key `lowest` and the id `last`."""
    key = _key(x)
    return (key > lowest) | ((key == lowest) & (key > 0) & (ids <= last))


@triton.jit
def _count(full, size, logits, out, pool_score, pool_id, kept, vocab, keep, key, BLOCK: tl.constexpr):
    """How many tokens have at least this key."""
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        x, _ = _piece(full, start, size, logits, out, pool_score, pool_id, kept, vocab, keep, BLOCK)
        found += (_key(x) >= key).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def _weigh(
    full, size, logits, out, pool_score, pool_id, kept, vocab, keep, high, steep, lowest, last, key, BLOCK: tl.constexpr
):
    """The weights of the tokens of at least this key that `_is_kept`."""
    found = tl.zeros([BLOCK], tl.int64)
    for start in range(0, size, BLOCK):
        x, ids = _piece(full, start, size, logits, out, pool_score, pool_id, kept, vocab, keep, BLOCK)
        counts = _is_kept(x, ids, lowest, last) & (_key(x) >= key)
        found += tl.where(counts, _weight((high - x) * steep), 0)
    return tl.sum(found, 0)


@triton.jit
def _last_id(full, size, logits, out, pool_score, pool_id, kept, vocab, keep, key, number, BLOCK: tl.constexpr):
    """The id of the `number`-th token with this key, by id."""
    last = tl.full((), 0, tl.int32)
    most = tl.full((), 0, tl.int32) + vocab - 1
    while last < most:
        middle = last + (most - last) // 2
        found = tl.zeros([BLOCK], tl.int32)
        for start in range(0, size, BLOCK):
            x, ids = _piece(full, start, size, logits, out, pool_score, pool_id, kept, vocab, keep, BLOCK)
            found += ((_key(x) == key) & (ids <= middle)).to(tl.int32)
        enough = tl.sum(found, 0) >= number
        last = tl.where(enough, last, middle + 1)
        most = tl.where(enough, middle, most)
    return last


@triton.jit
def _first_k(full, size, logits, out, pool_score, pool_id, kept, vocab, keep, k, low, most, BLOCK: tl.constexpr):
    """(key, id) of the k-th token, whose key is between `low` and `most`."""
    while low < most:
        middle = most - (most - low) // 2
        enough = _count(full, size, logits, out, pool_score, pool_id, kept, vocab, keep, middle, BLOCK) >= k
        low = tl.where(enough, middle, low)
        most = tl.where(enough, most, middle - 1)
    last = tl.full((), NO_ID, tl.int32)
    if _count(full, size, logits, out, pool_score, pool_id, kept, vocab, keep, low, BLOCK) > k:
        above = _count(full, size, logits, out, pool_score, pool_id, kept, vocab, keep, low + 1, BLOCK)
        last = _last_id(full, size, logits, out, pool_score, pool_id, kept, vocab, keep, low, k - above, BLOCK)
    return low, last


@triton.jit
def _first_p(
    full, size, logits, out, pool_score, pool_id, kept, vocab, keep, high, steep, lowest, last, limit, low, most,
    BLOCK: tl.constexpr,
):
    """(key, id) of the last token before which the weights of those that `_is_kept` are less than `limit`.

    low, most: bounds of that key; `low` also where no such token is in the pool.
    """
    while low < most:
        middle = most - (most - low) // 2
        enough = limit <= _weigh(
            full, size, logits, out, pool_score, pool_id, kept, vocab, keep, high, steep, lowest, last, middle, BLOCK
        )
        low = tl.where(enough, middle, low)
        most = tl.where(enough, most, middle - 1)
    found = low
    upto = _weigh(
        full, size, logits, out, pool_score, pool_id, kept, vocab, keep, high, steep, lowest, last, found, BLOCK
    )
    above = _weigh(
        full, size, logits, out, pool_score, pool_id, kept, vocab, keep, high, steep, lowest, last, found + 1, BLOCK
    )
    # tokens of one key have one weight
    tied = _count(full, size, logits, out, pool_score, pool_id, kept, vocab, keep, found, BLOCK)
    tied -= _count(full, size, logits, out, pool_score, pool_id, kept, vocab, keep, found + 1, BLOCK)
    if tied > 1:
        one = tl.zeros([BLOCK], tl.int64)
        for start in range(0, size, BLOCK):
            x, _ = _piece(full, start, size, logits, out, pool_score, pool_id, kept, vocab, keep, BLOCK)
            one = tl.maximum(one, tl.where(_key(x) == found, _weight((high - x) * steep), 0))
        weight = tl.maximum(tl.max(one, 0), 1)
        number = tl.minimum(limit - above + weight - 1, upto - above) // weight
        nth = _last_id(
            full, size, logits, out, pool_score, pool_id, kept, vocab, keep, found, number.to(tl.int32), BLOCK
        )
    else:
        nth = tl.full((), NO_ID, tl.int32)
    return found, nth


@triton.jit
def row_kernel(
    logits, out, temperature, top_k, top_p, seed, position, largest,
    total, present, kept, cut, best_score, best_id, pool_score, pool_id,
    token, probability, valid,
    vocab, tiles, logits_row, out_row,
    BLOCK: tl.constexpr, TILES: tl.constexpr, CAP: tl.constexpr, CONFIDENCE: tl.constexpr,
):
    """The choice of a row from what its tiles found. What they kept is not enough where more than CAP tokens of a tile
    may stay; then the row is read again, by this program alone."""
    row = tl.program_id(0)
    high = _largest(largest, row, tiles, TILES)
    finite = (high > -INFINITY) & (high < INFINITY)
    tl.store(valid + row, finite)
    if finite:
        hot, p = tl.load(temperature + row), tl.load(top_p + row)
        k = tl.minimum(tl.load(top_k + row), vocab).to(tl.int32)
        steep = _inverse(hot)
        tile = tl.arange(0, TILES)
        at, real = row * tiles + tile, tile < tiles
        weight = tl.full((), 1, tl.int64)
        if (p < 1) | CONFIDENCE:
            weight = tl.sum(tl.load(total + at, mask=real, other=0), 0)
        logits += row.to(tl.int64) * logits_row
        if out is not None:
            out += row.to(tl.int64) * out_row
        if (k < vocab) | (p < 1):
            number = tl.sum(tl.load(present + at, mask=real, other=0), 0)
            left_out = tl.max(tl.load(cut + at, mask=real, other=0), 0).to(tl.uint32)
            keep = tl.minimum(k, CAP)
            pool_score += row.to(tl.int64) * (tiles * CAP)
            pool_id += row.to(tl.int64) * (tiles * CAP)
            kept += row * tiles
            word = _row_word(tl.load(seed + row), tl.load(position + row))
            everything = weight
            lowest = tl.full((), 0, tl.uint32)
            last = tl.full((), NO_ID, tl.int32)
            size = tiles * keep
            full = ((k > CAP) & (k < number)).to(tl.int32)
            todo = tl.full((), 1, tl.int32)
            while todo > 0:
                size = tl.where(full > 0, vocab, tiles * keep)
                lowest = tl.full((), 0, tl.uint32)
                last = tl.full((), NO_ID, tl.int32)
                weight = everything
                if k < number:
                    low = tl.where(full > 0, 1, left_out)
                    lowest, last = _first_k(
                        full, size, logits, out, pool_score, pool_id, kept, vocab, keep, k, low, _key(high), BLOCK
                    )
                    if p < 1:
                        weight = _weigh(
                            full, size, logits, out, pool_score, pool_id, kept, vocab, keep, high, steep, lowest, last,
                            lowest, BLOCK,
                        )
                if p < 1:
                    limit = tl.maximum(tl.ceil(p.to(tl.float64) * weight.to(tl.float64)).to(tl.int64), 1)
                    low = tl.maximum(lowest, tl.where(full > 0, 1, left_out))
                    found, nth = _first_p(
                        full, size, logits, out, pool_score, pool_id, kept, vocab, keep, high, steep, lowest, last,
                        limit, low, _key(high), BLOCK,
                    )
                    last = tl.where(found == lowest, tl.minimum(last, nth), nth)
                    lowest = found
                missing = (full == 0) & (k > CAP) & (lowest <= left_out) & (left_out > 0)
                todo = missing.to(tl.int32)
                full = tl.maximum(full, todo)
            best = tl.full((), -INFINITY, tl.float32)
            chosen = tl.full((), NO_ID, tl.int32)
            sums = tl.zeros([BLOCK], tl.int64)
            for start in range(0, size, BLOCK):
                x, ids = _piece(full, start, size, logits, out, pool_score, pool_id, kept, vocab, keep, BLOCK)
                stays = _is_kept(x, ids, lowest, last)
                if CONFIDENCE:
                    sums += tl.where(stays, _weight((high - x) * steep), 0)
                score = tl.where(stays, x + hot * _gumbel(word, ids), -INFINITY)
                here = tl.max(score, 0)
                first = tl.min(tl.where(score == here, ids, NO_ID), 0)
                better = (here > best) | ((here == best) & (first < chosen))
                best = tl.where(better, here, best)
                chosen = tl.where(better, first, chosen)
            weight = tl.sum(sums, 0)
        else:
            score = tl.load(best_score + at, mask=real, other=-INFINITY)
            best = tl.max(score, 0)
            chosen = tl.min(tl.where(score == best, tl.load(best_id + at, mask=real, other=NO_ID), NO_ID), 0)
        tl.store(token + row, chosen.to(tl.int64))
        share = tl.full((), 0, tl.float32)
        if CONFIDENCE:
            own = _weight((high - tl.load(logits + chosen).to(tl.float32)) * steep)
            share = (own.to(tl.float64) / weight.to(tl.float64)).to(tl.float32)
        tl.store(probability + row, share)
    else:
        tl.store(token + row, 0)
        tl.store(probability + row, 0.0)
