"""The oracle of these tests against the library's own naive recurrences, which are plain PyTorch in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.hgrn.naive import naive_recurrent_hgrn
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.retention.naive import naive_retention
from torch import Tensor
from torch.nn import functional as F

from . import plain_kernels as plain

ROWS, LENGTH, KEY_HEADS, HEADS, KEY, VALUE = 2, 19, 2, 4, 8, 6


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    out, _ = delta_rule_recurrence(*_heads_first(q, k, v, beta))
    return out.transpose(1, 2)


def _rwkv7(q: Tensor, k: Tensor, v: Tensor, w: Tensor, a: Tensor, rate: Tensor) -> Tensor:
    out, _ = dplr_recurrence(*_heads_first(q, k, v, -a, a * rate, w))
    return out.transpose(1, 2)


def _kda(gate: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    def naive(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, rate: Tensor, bias: Tensor) -> Tensor:
        g = gate(g, A_log=rate, dt_bias=bias, **options)
        return naive_recurrent_kda(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, 2 * beta.sigmoid())[0]

    return naive


def _ours_kda(**options: Any) -> Callable[..., Tensor]:
    def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, rate: Tensor, bias: Tensor) -> Tensor:
        return plain.gated_delta_rule(
            q, k, v, g, beta, A_log=rate, dt_bias=bias, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=True, use_qk_l2norm_in_kernel=True, **options,
        )[0]

    return ours


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    named = {"q": normal(ROWS, LENGTH, HEADS, KEY), "k": normal(ROWS, LENGTH, HEADS, KEY)}
    named |= {"few_q": normal(ROWS, LENGTH, KEY_HEADS, KEY), "few_k": normal(ROWS, LENGTH, KEY_HEADS, KEY)}
    named |= {"v": normal(ROWS, LENGTH, HEADS, VALUE), "raw": normal(ROWS, LENGTH, HEADS, KEY)}
    named |= {"g": -normal(ROWS, LENGTH, HEADS).abs(), "wide_g": -normal(ROWS, LENGTH, HEADS, KEY).abs()}
    named |= {"beta": normal(ROWS, LENGTH, HEADS).sigmoid(), "raw_beta": normal(ROWS, LENGTH, HEADS)}
    named |= {"unit_q": F.normalize(named["q"], dim=-1), "unit_k": F.normalize(named["k"], dim=-1)}
    named |= {"wide_rate": normal(ROWS, LENGTH, HEADS, KEY).sigmoid()}
    named |= {"rate": normal(HEADS), "bias": normal(HEADS * KEY)}
    return named | {"x": normal(ROWS, LENGTH, 12), "flat_g": -normal(ROWS, LENGTH, 12).abs()}


_KDA = ["few_q", "few_k", "v", "raw", "raw_beta", "rate", "bias"]
CASES: dict[str, tuple[list[str], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gated delta rule": (
        ["unit_q", "unit_k", "v", "g", "beta"],
        lambda *args: plain.gated_delta_rule(*args)[0],
        lambda q, k, v, g, beta: naive_recurrent_gated_delta_rule(q, k, v, beta, g)[0],
    ),
    "kimi delta attention": (_KDA, _ours_kda(), _kda(naive_kda_gate)),
    "kimi delta attention, bounded gate": (
        _KDA, _ours_kda(lower_bound=-4.0), _kda(naive_kda_lowerbound_gate, lower_bound=-4.0),
    ),
    "delta rule": (["unit_q", "unit_k", "v", "beta"], lambda *args: plain.delta_rule(*args)[0], _delta_rule),
    "gla": (
        ["q", "k", "v", "wide_g"],
        lambda *args: plain.gla(*args)[0],
        lambda q, k, v, gk: naive_recurrent_gla(q, k, v, gk)[0],
    ),
    "retention": (
        ["q", "k", "v"],
        lambda *args: plain.retention(*args)[0],
        lambda *args: naive_retention(*_heads_first(*args)).transpose(1, 2),
    ),
    "linear attention": (
        ["q", "k", "v"],
        lambda *args: plain.linear_attention(*args, normalize=False)[0],
        lambda *args: naive_recurrent_linear_attn(*args)[0],
    ),
    "rwkv7": (
        ["q", "k", "v", "wide_g", "unit_k", "wide_rate"],
        lambda q, k, v, w, a, rate: plain.rwkv7(q, w, k, v, -a, a * rate, KEY**-0.5)[0],
        _rwkv7,
    ),
    "rwkv7, by rate": (
        ["q", "k", "v", "wide_g", "unit_k", "wide_rate"],
        lambda q, k, v, w, a, rate: plain.rwkv7_of_rate(q, w, k, v, a, rate, KEY**-0.5)[0],
        _rwkv7,
    ),
    "hgrn": (["x", "flat_g"], lambda *args: plain.hgrn(*args)[0], lambda *args: naive_recurrent_hgrn(*args)[0]),
}


@pytest.mark.parametrize("case", CASES)
def test_recurrence_is_the_librarys(case: str, tensors: dict[str, Tensor]) -> None:
    names, ours, naive = CASES[case]
    arguments = [tensors[name] for name in names]
    expected = naive(*arguments)
    assert (ours(*arguments) - expected).abs().max() <= 1e-5 * expected.abs().max()
