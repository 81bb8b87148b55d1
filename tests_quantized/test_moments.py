"""8-bit moments: the tables, codes and steps are those of bitsandbytes and torchao."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise
from torch import Tensor, nn
from torchao.optim.adam import single_param_adam
from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor
from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

from flarec.train.moments import BLOCK, MOMENTS, SCALE, AdamW8bit, CodeTable

CPU = torch.device("cpu")
SIZE = 300 * BLOCK
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.999), 1e-8, 0.1


def values_of(moment: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(SIZE, generator=generator) * 10 ** (-4 * torch.rand(SIZE, generator=generator))
    return values if moment == MOMENTS[0] else values.square()


def ours(values: Tensor, moment: str) -> tuple[Tensor, Tensor]:
    codes, scales = torch.zeros(SIZE, dtype=torch.uint8), torch.zeros(SIZE // BLOCK)
    CodeTable.of(moment, CPU).encode(values.clone(), codes, scales)
    return codes, scales


def check_same_but_for_ties(codes: Tensor, theirs: Tensor, share: float = 1e-4) -> None:
    distance = (codes.int() - theirs.int()).abs()
    assert int(distance.max()) <= 1 and float((distance > 0).float().mean()) < share


@pytest.mark.parametrize("moment", MOMENTS)
def test_tables_are_theirs(moment: str) -> None:
    table = CodeTable.of(moment, CPU).values
    of_torchao = torch.tensor(get_qmap_signed() if moment == MOMENTS[0] else get_qmap_unsigned())
    for theirs in (create_dynamic_map(signed=moment == MOMENTS[0]), of_torchao):
        torch.testing.assert_close(table, theirs, rtol=3e-7, atol=0)


@pytest.mark.parametrize("moment", MOMENTS)
def test_codes_are_those_of_torchao(moment: str) -> None:
    values = values_of(moment)
    codes, scales = ours(values, moment)
    scaled, scale = scale_tensor(values, BLOCK)
    table = CodeTable.of(moment, CPU)
    check_same_but_for_ties(codes, quantize_8bit_with_qmap(scaled, table.values))
    assert torch.equal(scales, scale)
    assert torch.equal(table.decode(codes, scales), dequant_with_qmap(codes, table.values, scales))


@pytest.mark.parametrize("moment", MOMENTS)
def test_codes_are_those_of_bitsandbytes(moment: str) -> None:
    """Its kernel of CPUs takes what is small in a block for other codes than the nearest: ours are never further."""
    values, table = values_of(moment), CodeTable.of(moment, CPU)
    codes, scales = ours(values, moment)
    theirs, state = quantize_blockwise(values, code=table.values, blocksize=BLOCK)
    assert torch.equal(scales, state.absmax)
    found, other = table.decode(codes, scales), dequantize_blockwise(theirs, state)
    torch.testing.assert_close(table.decode(theirs, state.absmax), other, rtol=1e-6, atol=0)
    assert ((found - values).abs() <= (other - values).abs() * (1 + 1e-5)).all()
    large = values.abs() > 0.01 * scales.repeat_interleave(BLOCK)
    check_same_but_for_ties(codes[large], theirs[large], share=1e-2)


def test_steps_are_those_of_torchao() -> None:
    """Its update without the compiler, over twenty steps of the same gradients."""
    generator = torch.Generator().manual_seed(1)
    value = nn.Parameter(torch.randn(SIZE, generator=generator))
    theirs = value.detach().clone()
    optimizer = AdamW8bit([value], [value], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    states = [OptimState8bit.zeros((SIZE,), signed, BLOCK, "cpu", torch.float32) for signed in (True, False)]
    start = theirs.clone()
    for step in range(1, 21):
        value.grad = torch.randn(SIZE, generator=generator) * torch.rand(SIZE, generator=generator) ** 2
        optimizer.step()
        single_param_adam(
            theirs, value.grad, torch.tensor(float(step)), *states, None, torch.tensor(LR), *BETAS, DECAY, EPS,
            IS_ADAMW=True, BF16_STOCHASTIC_ROUND=False,
        )
    for moment, state in zip(MOMENTS, states, strict=True):
        check_same_but_for_ties(optimizer.state[value][moment], state.codes, share=2e-3)
        torch.testing.assert_close(optimizer.state[value][moment + SCALE], state.scale, rtol=1e-4, atol=0)
    moved, apart = (value.detach() - start).abs(), (value.detach() - theirs).abs()
    assert float(apart.mean()) < 1e-3 * float(moved.mean())
