"""The choice of a token as a loop over tokens: the specification (docs/semantics.md section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import arithmetic as a

WORD = 2**64
ONE = np.float32(1)


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * a.MULTIPLY[0] % WORD
    x = (x ^ (x >> 27)) * a.MULTIPLY[1] % WORD
    return x ^ (x >> 31)


def uniform(seed: int, position: int, token: int) -> np.float32:
    """The hash of (seed, position, id) as a float32 strictly inside (0, 1)."""
    row = _mix((_mix((seed + a.STRIDE) % WORD) + position * a.STRIDE) % WORD)
    word = _mix((row + (token + 1) * a.STRIDE) % WORD)
    odd = 2 * (word >> (64 - a.UNIFORM_BITS)) + 1
    return min(np.float32(odd) * np.float32(2.0 ** -(a.UNIFORM_BITS + 1)), np.float32(1 - 2.0**-24))


def random_id(seed: int, position: int, pool: Sequence[int]) -> int:
    """What a noisy position shows where noise is random ids."""
    row = _mix((_mix((seed + a.STRIDE) % WORD) + position * a.STRIDE) % WORD)
    return pool[(_mix(row) >> 32) * len(pool) >> 32]


def _polynomial(terms: Sequence[float], x: np.float32) -> np.float32:
    y = x * np.float32(terms[0])
    for term in terms[1:-1]:
        y = (y + np.float32(term)) * x
    return y + np.float32(terms[-1])


def log(x: np.float32) -> np.float32:
    """Natural logarithm of a positive normal number; every operation rounds to float32."""
    bits = int(x.view(np.int32))
    exponent = (bits - a.ROOT_HALF) >> 23
    f = np.int32(bits - (exponent << 23)).view(np.float32) - ONE
    power, square = np.float32(exponent), f * f
    y = _polynomial(a.LOG_TERMS, f) * f * square
    y = y + power * np.float32(a.LOG2_LOW)
    y = y - square * np.float32(0.5)
    return (f + y) + power * np.float32(a.LOG2_HIGH)


def gumbel(seed: int, position: int, token: int) -> np.float32:
    """-log(-log(1 - u)) of `uniform`."""
    u = uniform(seed, position, token)
    rest = ONE - u
    lost = (ONE - rest) - u
    return np.float32(0) - log(np.float32(0) - (log(rest) + lost))


def weight(below: np.float32) -> int:
    """floor(2^42 exp(-below)), below >= 0."""
    x = min(below, np.float32(a.SMALLEST))
    power = int(x * np.float32(a.LOG2_E) + np.float32(0.5))
    whole = np.float32(power)
    r = (whole * np.float32(a.LOG2_HIGH) - x) + whole * np.float32(a.LOG2_LOW)
    y = (_polynomial(a.EXP_TERMS, r) * (r * r) + r) + ONE
    return (int(y * np.float32(2.0**24)) << (a.WEIGHT_BITS - 24)) >> power


def _inverse(temperature: np.float32) -> np.float32:
    return min(ONE / temperature, np.float32(a.STEEPEST)) if temperature > 0 else ONE


def _row(
    logits: Sequence[np.float32], temperature: np.float32, top_k: int, top_p: np.float32, seed: int, position: int,
    out: Sequence[bool],
) -> tuple[int, float] | None:
    """(id, probability), or None where the largest logit is not finite."""
    ids = [i for i in range(len(logits)) if not out[i]]
    if not ids or any(math.isnan(logits[i]) or logits[i] == math.inf for i in ids):
        return None
    ids = [i for i in ids if logits[i] > -math.inf]
    if not ids:
        return None
    ids.sort(key=lambda i: (-logits[i], i))
    steep = _inverse(temperature)
    kept = ids[:top_k]
    weights = [weight((logits[ids[0]] - logits[i]) * steep) for i in kept]
    if top_p < 1:
        limit, before, number = max(1, math.ceil(float(top_p) * float(sum(weights)))), 0, 0
        while number < len(kept) and before < limit:
            before += weights[number]
            number += 1
        kept, weights = kept[:number], weights[:number]
    scores = {i: logits[i] + temperature * gumbel(seed, position, i) for i in kept}
    token = max(sorted(kept), key=lambda i: scores[i])
    return token, float(weights[kept.index(token)]) / float(sum(weights))


def choose(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor, out: Tensor
) -> list[tuple[int, float] | None]:
    """Per row the chosen id and its probability, or None; `choose` of this package says what the operands are.

    out [N, V] bool: ids that are never chosen.
    """
    with np.errstate(all="ignore"):
        values = logits.to(torch.float32).cpu().numpy()
        hot, cut = temperature.cpu().numpy(), top_p.cpu().numpy()
        return [
            _row(list(values[n]), hot[n], int(top_k[n]), cut[n], int(seed[n]), int(position[n]), out[n].tolist())
            for n in range(len(values))
        ]
