"""The Triton program of a row: its choice from what the programs of its tiles found (`triton_kernels`)."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import UNCHOSEN
from .triton_kernels import INFINITY, NO_ID, _gumbel, _inverse, _key, _largest, _row_word, _scores, _source, _weight

NOTHING = tl.constexpr(UNCHOSEN)


@triton.jit
def _pooled(pool_score, pool_id, place, size):
    """(scores, ids) at places of a row's pool; -infinity behind its end."""
    inside = place < size
    x = tl.load(pool_score + place, mask=inside, other=-INFINITY)
    return x, tl.load(pool_id + place, mask=inside, other=0)


@triton.jit
def _piece(full, start, size, logits, out, pool_score, pool_id, vocab, BLOCK: tl.constexpr):
    """(scores, ids) of a piece of the row, or of its pool; -infinity where there is nothing. Pointers are the row's."""
    place = start + tl.arange(0, BLOCK)
    if full > 0:
        x, ids = _scores(logits, out, place, vocab), place
    else:
        x, ids = _pooled(pool_score, pool_id, place, size)
    return x, ids


@triton.jit
def _is_kept(x, ids, lowest, last):
    """Whether tokens are among the first: the last one has the key `lowest` and the id `last`."""
    key = _key(x)
    return (key > lowest) | ((key == lowest) & (key > 0) & (ids <= last))


@triton.jit
def _count(full, size, logits, out, pool_score, pool_id, vocab, key, BLOCK: tl.constexpr):
    """How many tokens have at least this key."""
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        x, _ = _piece(full, start, size, logits, out, pool_score, pool_id, vocab, BLOCK)
        found += (_key(x) >= key).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def _weigh(full, size, logits, out, pool_score, pool_id, vocab, high, steep, lowest, last, key, BLOCK: tl.constexpr):
    """The weights of the tokens of at least this key that `_is_kept`."""
    found = tl.zeros([BLOCK], tl.int64)
    for start in range(0, size, BLOCK):
        x, ids = _piece(full, start, size, logits, out, pool_score, pool_id, vocab, BLOCK)
        counts = _is_kept(x, ids, lowest, last) & (_key(x) >= key)
        found += tl.where(counts, _weight((high - x) * steep), 0)
    return tl.sum(found, 0)


@triton.jit
def _last_id(full, size, logits, out, pool_score, pool_id, vocab, key, number, BLOCK: tl.constexpr):
    """The id of the `number`-th token with this key, by id."""
    last = tl.full((), 0, tl.int32)
    most = tl.full((), 0, tl.int32) + vocab - 1
    while last < most:
        middle = last + (most - last) // 2
        found = tl.zeros([BLOCK], tl.int32)
        for start in range(0, size, BLOCK):
            x, ids = _piece(full, start, size, logits, out, pool_score, pool_id, vocab, BLOCK)
            found += ((_key(x) == key) & (ids <= middle)).to(tl.int32)
        enough = tl.sum(found, 0) >= number
        last = tl.where(enough, last, middle + 1)
        most = tl.where(enough, middle, most)
    return last


@triton.jit
def _first_k(full, size, logits, out, pool_score, pool_id, vocab, k, low, most, BLOCK: tl.constexpr):
    """(key, id) of the k-th token, whose key is between `low` and `most`."""
    while low < most:
        middle = most - (most - low) // 2
        enough = _count(full, size, logits, out, pool_score, pool_id, vocab, middle, BLOCK) >= k
        low = tl.where(enough, middle, low)
        most = tl.where(enough, most, middle - 1)
    last = tl.full((), NO_ID, tl.int32)
    if _count(full, size, logits, out, pool_score, pool_id, vocab, low, BLOCK) > k:
        above = _count(full, size, logits, out, pool_score, pool_id, vocab, low + 1, BLOCK)
        last = _last_id(full, size, logits, out, pool_score, pool_id, vocab, low, k - above, BLOCK)
    return low, last


@triton.jit
def _first_p(
    full, size, logits, out, pool_score, pool_id, vocab, high, steep, lowest, last, limit, low, most,
    BLOCK: tl.constexpr,
):
    """(key, id) of the last token before which the weights of those that `_is_kept` are less than `limit`.

    low, most: bounds of that key; `low` also where no such token is in the pool.
    """
    while low < most:
        middle = most - (most - low) // 2
        enough = limit <= _weigh(
            full, size, logits, out, pool_score, pool_id, vocab, high, steep, lowest, last, middle, BLOCK
        )
        low = tl.where(enough, middle, low)
        most = tl.where(enough, most, middle - 1)
    found = low
    upto = _weigh(full, size, logits, out, pool_score, pool_id, vocab, high, steep, lowest, last, found, BLOCK)
    above = _weigh(full, size, logits, out, pool_score, pool_id, vocab, high, steep, lowest, last, found + 1, BLOCK)
    # tokens of one key have one weight
    tied = _count(full, size, logits, out, pool_score, pool_id, vocab, found, BLOCK)
    tied -= _count(full, size, logits, out, pool_score, pool_id, vocab, found + 1, BLOCK)
    if tied > 1:
        one = tl.zeros([BLOCK], tl.int64)
        for start in range(0, size, BLOCK):
            x, _ = _piece(full, start, size, logits, out, pool_score, pool_id, vocab, BLOCK)
            one = tl.maximum(one, tl.where(_key(x) == found, _weight((high - x) * steep), 0))
        weight = tl.maximum(tl.max(one, 0), 1)
        number = tl.minimum(limit - above + weight - 1, upto - above) // weight
        nth = _last_id(full, size, logits, out, pool_score, pool_id, vocab, found, number.to(tl.int32), BLOCK)
    else:
        nth = tl.full((), NO_ID, tl.int32)
    return found, nth


@triton.jit
def _limit(p, weight):
    """Top-p keeps a token while the weights before it are less."""
    return tl.maximum(tl.ceil(p.to(tl.float64) * weight.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def _best(x, ids, stays, hot, word):
    """(score, id) of the best of the tokens that stay, by noisy score; the lowest id of equal ones."""
    score = tl.where(stays, x + hot * _gumbel(word, ids), -INFINITY)
    best = tl.max(score, 0)
    return best, tl.min(tl.where(score == best, ids, NO_ID), 0)


@triton.jit
def _of_few(pool_score, pool_id, size, k, p, hot, steep, high, word, FEW: tl.constexpr, STRIP: tl.constexpr):
    """(id, weight of all that stay) from a pool of at most FEW tokens that holds the k first ones: by the tokens, and
    the weights, before each of them."""
    x, ids = _pooled(pool_score, pool_id, tl.arange(0, FEW), size)
    key = _key(x)
    rank = tl.zeros([FEW], tl.int32)
    before = tl.zeros([FEW], tl.int64)
    for start in range(0, size, STRIP):
        other, other_ids = _pooled(pool_score, pool_id, start + tl.arange(0, STRIP), size)
        others = _key(other)
        first = (others[None, :] > key[:, None]) | (
            (others[None, :] == key[:, None]) & (other_ids[None, :] < ids[:, None])
        )
        rank += tl.sum(first.to(tl.int32), 1)
        if p < 1:
            before += tl.sum(tl.where(first, _weight((high - other) * steep)[None, :], 0), 1)
    stays = (key > 0) & (rank < k)
    weight = tl.where(stays, _weight((high - x) * steep), 0)
    if p < 1:
        stays = stays & (before < _limit(p, tl.sum(weight, 0)))
        weight = tl.where(stays, weight, 0)
    _, chosen = _best(x, ids, stays, hot, word)
    return chosen, tl.sum(weight, 0)


@triton.jit
def _of_many(
    logits, out, pool_score, pool_id, held, number, everything, left_out, k, p, hot, steep, high, word, vocab,
    BLOCK: tl.constexpr, CAP: tl.constexpr, CONFIDENCE: tl.constexpr,
):
    """(id, weight of all that stay) of a row that truncates. What its tiles kept is not enough where more than CAP
    tokens of a tile may stay; then the row is read again, by this program alone."""
    lowest = tl.full((), 0, tl.uint32)
    last = tl.full((), NO_ID, tl.int32)
    weight = everything
    size = held
    full = ((k > CAP) & (k < number)).to(tl.int32)
    todo = tl.full((), 1, tl.int32)
    while todo > 0:
        size = tl.where(full > 0, vocab, held)
        lowest = tl.full((), 0, tl.uint32)
        last = tl.full((), NO_ID, tl.int32)
        weight = everything
        if k < number:
            low = tl.where(full > 0, 1, left_out)
            lowest, last = _first_k(full, size, logits, out, pool_score, pool_id, vocab, k, low, _key(high), BLOCK)
            if p < 1:
                weight = _weigh(
                    full, size, logits, out, pool_score, pool_id, vocab, high, steep, lowest, last, lowest, BLOCK
                )
        if p < 1:
            low = tl.maximum(lowest, tl.where(full > 0, 1, left_out))
            found, nth = _first_p(
                full, size, logits, out, pool_score, pool_id, vocab, high, steep, lowest, last, _limit(p, weight), low,
                _key(high), BLOCK,
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
        x, ids = _piece(full, start, size, logits, out, pool_score, pool_id, vocab, BLOCK)
        stays = _is_kept(x, ids, lowest, last)
        if CONFIDENCE:
            sums += tl.where(stays, _weight((high - x) * steep), 0)
        here, first = _best(x, ids, stays, hot, word)
        better = (here > best) | ((here == best) & (first < chosen))
        best = tl.where(better, here, best)
        chosen = tl.where(better, first, chosen)
    return chosen, tl.sum(sums, 0)


@triton.jit
def row_kernel(
    logits, out, source, temperature, top_k, top_p, seed, position, largest,
    total, present, held, cut, best_score, best_id, pool_score, pool_id,
    token, probability, valid,
    vocab, tiles, parts, per, logits_row, out_row,
    BLOCK: tl.constexpr, TILES: tl.constexpr, ALL: tl.constexpr, FEW: tl.constexpr, STRIP: tl.constexpr,
    CAP: tl.constexpr, CONFIDENCE: tl.constexpr,
):
    """The choice of a row from what its tiles found."""
    row = tl.program_id(0)
    setting = row // per
    high = _largest(largest, row, tiles * parts, ALL)
    finite = (high > -INFINITY) & (high < INFINITY)
    tl.store(valid + row, finite)
    if finite:
        hot, p = tl.load(temperature + setting), tl.load(top_p + setting)
        k = tl.minimum(tl.load(top_k + setting), vocab).to(tl.int32)
        steep = _inverse(hot)
        tile = tl.arange(0, TILES)
        at, real = row * tiles + tile, tile < tiles
        from_row = _source(source, row)
        logits += from_row * logits_row
        if out is not None:
            out += from_row * out_row
        weight = tl.full((), 1, tl.int64)
        chosen = tl.full((), NO_ID, tl.int32)
        if (not CONFIDENCE) & (hot <= 0):
            part = tl.arange(0, ALL)
            best = tl.load(largest + row * tiles * parts + part, mask=part < tiles * parts, other=-INFINITY)
            ids = tl.load(best_id + row * tiles + part // parts, mask=part < tiles * parts, other=NO_ID)
            chosen = tl.min(tl.where(best == high, ids, NO_ID), 0)
        elif (k < vocab) | (p < 1):
            size = tl.load(held + row)
            word = _row_word(tl.load(seed + setting), tl.load(position + setting) + row % per)
            pool_score += row.to(tl.int64) * (tiles * CAP)
            pool_id += row.to(tl.int64) * (tiles * CAP)
            if (k <= CAP) & (size <= FEW):
                chosen, weight = _of_few(pool_score, pool_id, size, k, p, hot, steep, high, word, FEW, STRIP)
            else:
                number = size
                left_out = tl.full((), 0, tl.uint32)
                if k > CAP:
                    number = tl.sum(tl.load(present + at, mask=real, other=0), 0)
                    left_out = tl.max(tl.load(cut + at, mask=real, other=0), 0).to(tl.uint32)
                    if (p < 1) | CONFIDENCE:
                        weight = tl.sum(tl.load(total + at, mask=real, other=0), 0)
                elif p < 1:
                    weight = _weigh(
                        0, size, logits, out, pool_score, pool_id, vocab, high, steep, left_out, NO_ID, left_out, BLOCK
                    )
                chosen, weight = _of_many(
                    logits, out, pool_score, pool_id, size, number, weight, left_out, k, p, hot, steep, high, word,
                    vocab, BLOCK, CAP, CONFIDENCE,
                )
        else:
            if CONFIDENCE:
                weight = tl.sum(tl.load(total + at, mask=real, other=0), 0)
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
        tl.store(token + row, NOTHING)
        tl.store(probability + row, 0.0)
