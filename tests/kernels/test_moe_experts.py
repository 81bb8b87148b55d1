"""moe_experts: grouped against the reference, the reference against one token at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flarec.errors import CaptureError
from flarec.kernels.moe_experts import reference
from flarec.kernels.moe_experts.torch_grouped import grouped


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 6),
    choices=st.integers(1, 3),
    activation=st.sampled_from(["silu", "swish", "gelu", "gelu_pytorch_tanh", "relu", "relu2"]),
    gated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_grouped_equals_reference(
    tokens: int, experts: int, choices: int, activation: str, gated: bool, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    index = torch.randint(0, experts + 1, (tokens, choices), generator=gen)  # experts itself means dropped
    shapes = ((tokens, 5), (tokens, choices), (experts, 8 if gated else 4, 5), (experts, 5, 4))
    x, weight, up_weight, down = (torch.randn(s, generator=gen, dtype=torch.float64).requires_grad_() for s in shapes)
    expected = reference(x, index, weight, up_weight, down, activation=activation, gated=gated)
    got = grouped(x, index, weight, up_weight, down, activation=activation, gated=gated)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    if not got.requires_grad:
        assert tokens == 0 or bool((index == experts).all())
        return
    weights = torch.randn(expected.shape, generator=gen, dtype=torch.float64)
    inputs = (x, weight, up_weight, down)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, theirs in zip(torch.autograd.grad((got * weights).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
def test_reference_equals_one_token_at_a_time(gated: bool) -> None:
    gen = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 4, generator=gen), torch.rand(6, 2, generator=gen)
    up_weight, down = torch.randn(3, 10 if gated else 5, 4, generator=gen), torch.randn(3, 4, 5, generator=gen)
    index = torch.tensor([[0, 1], [2, 0], [3, 3], [1, 3], [2, 1], [0, 2]])  # 3 = dropped
    for n in range(6):
        total = torch.zeros(4)
        for j in range(2):
            e = int(index[n, j])
            if e < 3:
                first = up_weight[e, :5] @ x[n]
                if gated:
                    hidden = first / (1 + torch.exp(-first)) * (up_weight[e, 5:] @ x[n])  # silu
                else:
                    hidden = torch.where(first > 0, first, 0.0) ** 2
                total += weight[n, j] * (down[e] @ hidden)
        for op in (reference, grouped):
            got = op(x, index, weight, up_weight, down, activation="silu" if gated else "relu2", gated=gated)[n]
            torch.testing.assert_close(got, total, rtol=1e-5, atol=1e-5)


def test_unknown_activation_is_named() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(CaptureError, match="tanh"):
        grouped(
            one, torch.zeros(1, 1, dtype=torch.int64), one, torch.ones(1, 2, 1), torch.ones(1, 1, 1), activation="tanh"
        )
