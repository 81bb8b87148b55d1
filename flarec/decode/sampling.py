"""Sampling with counter-hash noise: a token is a pure function of its logits, the request's seed and its position.

The token for document position `t` is `argmax(logits + T * Gumbel(seed, t, token))` over the truncated vocabulary. The
noise depends on nothing else: not on the row, the step, the slot in the batch or the device. A draft for `t` that uses
the same noise is therefore accepted whenever its logits lead to the same choice, and AR-Trust returns what causal
decoding returns. T = 0 is the same formula. Contract: docs/semantics.md section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.base.generation import GenerationOptions

UNCHOSEN = -2
"""What `choose` gives for a row without a finite largest logit; no id, and not the -1 with which modes mark gaps."""


@dataclass(frozen=True)
class SamplingRows:
    """Sampling parameters of N rows as vectors, so that one batch can mix requests.

    temperature [N] float32, top_k [N] int64 (a huge number where off), top_p [N] float32, seed [N] int64.
    `truncated` / `sampled` say whether any row truncates / has a temperature above 0: known on the host, so that work
    which cannot change the result is skipped without asking the device.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    truncated: bool
    sampled: bool

    @staticmethod
    def build(options: Sequence[GenerationOptions], device: torch.device | str = "cpu") -> SamplingRows:
        everything = 2**62
        return SamplingRows(
            torch.tensor([row.temperature for row in options], dtype=torch.float32, device=device),
            torch.tensor([row.top_k or everything for row in options], dtype=torch.int64, device=device),
            torch.tensor([row.top_p for row in options], dtype=torch.float32, device=device),
            torch.tensor([row.seed for row in options], dtype=torch.int64, device=device),
            truncated=any(row.top_k or row.top_p < 1 for row in options),
            sampled=any(row.temperature > 0 for row in options),
        )

    def take(self, rows: Tensor) -> SamplingRows:
        """The parameters of rows `rows` [n] int64, in that order."""
        picked = (self.temperature[rows], self.top_k[rows], self.top_p[rows], self.seed[rows])
        return SamplingRows(*picked, self.truncated, self.sampled)

    def join(self, other: SamplingRows) -> SamplingRows:
        """The rows of both."""
        return SamplingRows(
            torch.cat([self.temperature, other.temperature]),
            torch.cat([self.top_k, other.top_k]),
            torch.cat([self.top_p, other.top_p]),
            torch.cat([self.seed, other.seed]),
            self.truncated or other.truncated,
            self.sampled or other.sampled,
        )


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number (torch multiplies int64 modulo 2^64)."""
    return value - 2**64 if value >= 2**63 else value


_STRIDE = _signed(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: consecutive counters land far apart
_MULTIPLY = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))  # odd, about half their bits set
UNIFORM_BITS = 40


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64 bits (torch's `>>` copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit words in which every input bit moves about half of the output bits (xorshift-multiply)."""
    x = (x ^ _shift(x, 30)) * _MULTIPLY[0]
    x = (x ^ _shift(x, 27)) * _MULTIPLY[1]
    return x ^ _shift(x, 31)


def to_unit(word: Tensor) -> Tensor:
    """The upper `UNIFORM_BITS` bits of 64-bit words as float32 strictly inside (0, 1).

    Small values keep full relative precision (2^-41 is the smallest): they decide the argmax over a large vocabulary.
    """
    odd = (_shift(word, 64 - UNIFORM_BITS) << 1) | 1
    return (odd.to(torch.float32) * 2.0 ** -(UNIFORM_BITS + 1)).clamp_max(1 - 2.0**-24)


def uniform(seed: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """Counter-based uniforms. seed [N], position [N], token [V] int64 -> [N, V] float32 strictly inside (0, 1).

    Integer arithmetic and one correctly rounded conversion: the same bits on every device.
    """
    row = _mix(_mix(seed + _STRIDE) + position * _STRIDE)
    return to_unit(_mix(row[:, None] + (token[None, :] + 1) * _STRIDE))


def gumbel(seed: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise, a pure function. seed [N], position [N], token [V] int64 -> [N, V] float32, finite."""
    return -torch.log(-torch.log1p(-uniform(seed, position, token)))


def truncation(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Tokens that top-k, then top-p, keep. scaled [N, V] = logits / T, top_k [N], top_p [N] -> [N, V] bool.

    Top-p works on the distribution that top-k left. The most probable token always stays; among equal logits the lower
    id comes first.
    """
    ordered, order = scaled.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    keep = rank < top_k[:, None]
    reached = ordered.masked_fill(~keep, -math.inf).softmax(dim=1).cumsum(dim=1)
    before = torch.nn.functional.pad(reached[:, :-1], (1, 0))
    # top_p = 1 keeps all: a rounded sum that reaches 1 early must not cut the tail off
    # rank 0 stays even where a tiny top_p is 0 in float32
    keep &= (before < top_p[:, None]) | (top_p[:, None] >= 1) | (rank == 0)
    return torch.zeros_like(keep).scatter_(1, order, keep)


def choose(
    logits: Tensor, params: SamplingRows, positions: Tensor, suppress: Sequence[int] | Tensor = ()
) -> tuple[Tensor, Tensor]:
    """Choose one token per row.

    logits [N, V] (any float dtype, computed in float32), params of N rows, positions [N] int64 = absolute document
    position of the token that is being chosen, suppress = ids that are never chosen.
    Returns token [N] int64 and its probability [N] float32 under the truncated softmax(logits / T) (T = 0: T = 1).
    Equal scores go to the lowest id. A row whose largest logit is not a finite float32 (NaN anywhere, infinity, or
    nothing left to choose) gives `UNCHOSEN` with probability 0.
    """
    scores = logits.float()
    if len(suppress):
        ids = torch.as_tensor(suppress, dtype=torch.int64, device=logits.device)
        scores = scores.index_fill(1, ids, -math.inf)
    temperature = params.temperature[:, None]
    largest = scores.amax(dim=1, keepdim=True)
    # subtracting the maximum first keeps tiny temperatures finite
    scaled = (scores - largest) / torch.where(temperature > 0, temperature, 1.0)
    if params.truncated:
        dropped = ~truncation(scaled, params.top_k, params.top_p)
        scores, scaled = scores.masked_fill(dropped, -math.inf), scaled.masked_fill(dropped, -math.inf)
    if params.sampled:
        ids = torch.arange(logits.shape[1], device=logits.device)
        # both terms are finite (`HOTTEST`), but for the -inf of what must not be chosen
        scores = scores + temperature * gumbel(params.seed, positions, ids)
    token = scores.argmax(dim=1)
    probability = (scaled.gather(1, token[:, None]).squeeze(1) - scaled.logsumexp(dim=1)).exp()
    valid = largest.squeeze(1).isfinite()
    return torch.where(valid, token, UNCHOSEN), torch.where(valid, probability, 0.0)
