"""Noise and weights of tokens in fixed sequences of IEEE operations (docs/kernels.md, "Sampling").

A logarithm or exponential of a library differs between devices in its last bit, and one bit may decide an argmax. Here
each is a polynomial in float32 whose steps are rounded one by one, so that every device gets the same bits. Weights are
integers, so that their sums do not depend on an order. The Triton kernel and the reference repeat these steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number (torch multiplies int64 modulo 2^64)."""
    return value - 2**64 if value >= 2**63 else value


STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: consecutive counters land far apart
MULTIPLY = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # odd, about half their bits set
UNIFORM_BITS = 40

# Chebyshev fits, the highest power first, rounded to float32.
LOG_TERMS = (
    0.07149753719568253, -0.115712009370327, 0.11661510914564133, -0.12411050498485565, 0.14249937236309052,
    -0.1666848063468933, 0.20000708103179932, -0.24999989569187164, 0.3333333134651184,
)
"""(log(1 + f) - f + f^2 / 2) / f^3 for 1 + f in [sqrt(1/2), sqrt(2)]."""
EXP_TERMS = (
    0.000198992871446535, 0.0013933652080595493, 0.0083332983776927, 0.04166646674275398, 0.1666666716337204, 0.5,
)
"""(exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2."""
LOG2_HIGH, LOG2_LOW = 0.693359375, -0.00021219444170128554  # their sum is log(2); multiples of the first are exact
LOG2_E = 1.4426950216293335
ROOT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)

UNCHOSEN = -2
"""The token of a row without a finite largest logit; no id, and not the -1 with which decode modes mark gaps."""
WEIGHT_BITS = 42
"""The weight of the largest logit is 2^42: a token of 2^-42 of its probability counts, and sums of 2^20 fit."""
SMALLEST = 42.0  # differences beyond it have weight 0 anyway, and shifts stay below 64
STEEPEST = 2.0**126  # of 1 / temperature, finite for every temperature


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64 bits (torch's `>>` copies the sign)."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_(x: Tensor) -> Tensor:
    """A bijection of 64-bit words in which every input bit moves about half of the output bits (xorshift-multiply).

    In place, as is all that follows: on a CPU, memory for every step would cost more than the steps.
    """
    x.bitwise_xor_(_shift(x, 30)).mul_(_signed(MULTIPLY[0]))
    x.bitwise_xor_(_shift(x, 27)).mul_(_signed(MULTIPLY[1]))
    return x.bitwise_xor_(_shift(x, 31))


def to_unit(word: Tensor) -> Tensor:
    """The upper `UNIFORM_BITS` bits of 64-bit words as float32 strictly inside (0, 1).

    Small values keep full relative precision (2^-41 is the smallest): they decide the argmax over a large vocabulary.
    """
    odd = _shift(word, 64 - UNIFORM_BITS).bitwise_left_shift_(1).bitwise_or_(1)
    return odd.to(torch.float32).mul_(2.0 ** -(UNIFORM_BITS + 1)).clamp_max_(1 - 2.0**-24)


def uniform(seed: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """Counter-based uniforms. seed [N], position [N], token [V] or [N, V] int64 -> [N, V] float32 inside (0, 1).

    Integer arithmetic and one correctly rounded conversion: the same bits on every device.
    """
    stride = _signed(STRIDE)
    row = _mix_(_mix_(seed + stride) + position * stride)
    return to_unit(_mix_(row[:, None] + (token + 1) * stride))


def random_words(seed: Tensor, position: Tensor) -> Tensor:
    """The upper 32 bits of the hash of (seed, position) with the counter before that of token 0. seed [R], position
    [R, n] int64 -> [R, n] int64."""
    stride = _signed(STRIDE)
    row = _mix_(_mix_(seed + stride)[:, None] + position * stride)
    return _shift(_mix_(row), 32)


def _polynomial(terms: tuple[float, ...], x: Tensor) -> Tensor:
    y = x * terms[0]
    for term in terms[1:-1]:
        y.add_(term).mul_(x)
    return y.add_(terms[-1])


def log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32 numbers, to about one unit in the last place."""
    bits = x.view(torch.int32)
    exponent = (bits - ROOT_HALF).bitwise_right_shift_(23)
    power = exponent.to(torch.float32)
    f = torch.sub(bits, exponent.bitwise_left_shift_(23)).view(torch.float32).sub_(1.0)
    square = f * f
    y = _polynomial(LOG_TERMS, f).mul_(f).mul_(square)
    y.add_(power * LOG2_LOW).sub_(square.mul_(0.5))
    return f.add_(y).add_(power.mul_(LOG2_HIGH))


def gumbel_of(u: Tensor) -> Tensor:
    """-log(-log(1 - u)) of float32 numbers in [2^-41, 1 - 2^-24]; finite."""
    rest = 1.0 - u
    lost = (1.0 - rest).sub_(u)  # exact: what rounding took from `rest`
    return log(log(rest).add_(lost).neg_()).neg_()


def gumbel(seed: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise, a pure function. seed [N], position [N], token [V] or [N, V] int64 -> [N, V] float32."""
    return gumbel_of(uniform(seed, position, token))


def inverse(temperature: Tensor) -> Tensor:
    """1 / T of float32 temperatures as the weights take it: 1 for T = 0, finite for the smallest."""
    hot = temperature > 0
    return torch.where(hot, (1.0 / torch.where(hot, temperature, 1.0)).clamp_max(STEEPEST), 1.0)


def weights(below: Tensor) -> Tensor:
    """floor(2^42 exp(-x)) as int64, to float32's precision. below: x >= 0, float32, infinity included."""
    x = below.clamp_max(SMALLEST)
    power = (x * LOG2_E).add_(0.5).to(torch.int32)
    whole = power.to(torch.float32)
    r = (whole * LOG2_HIGH).sub_(x).add_(whole.mul_(LOG2_LOW))
    y = _polynomial(EXP_TERMS, r).mul_(r * r).add_(r).add_(1.0)
    return y.mul_(2.0**WEIGHT_BITS).to(torch.int64).bitwise_right_shift_(power)
