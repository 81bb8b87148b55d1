"""AdamW with moments as 8-bit codes: the codes, the step, and how far it may be from AdamW's in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from flarec.recipe import load_recipe
from flarec.train import moments
from flarec.train.moments import BLOCK, LEAST, MOMENTS, SCALE, STEP, AdamW8bit, CodeTable, moment_bytes, names_in_codes

CPU = torch.device("cpu")
SIZES = [1, 255, 256, 257, 5 * 256 + 77, 16 * 256]
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1


def dynamic_tree(moment: str) -> Tensor:
    """[256] float64, read bit by bit (https://arxiv.org/abs/2110.02861, section 2.1): zeros before the first 1 count
    powers of ten, what follows it is a fraction of 0.1 to 1. The second moment has no sign, and its bit goes to the
    fraction."""
    signed = moment == MOMENTS[0]
    found = {0.0, 1.0}
    for code in range(1, 128):
        zeros = 7 - code.bit_length()
        bits = 6 - zeros + (not signed)
        steps = [code - (1 << 6 - zeros)] if signed else [2 * (code - (1 << 6 - zeros)) + low for low in range(2)]
        for step in steps:
            value = 10.0**-zeros * (0.1 + 0.9 * (step + 0.5) / 2**bits)
            found |= {value, -value} if signed else {value}
    return torch.tensor(sorted(found), dtype=torch.float64)


def spread(size: int, moment: str, seed: int = 0) -> Tensor:
    """Values over many powers of ten, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * 10 ** (-9 * torch.rand(size, generator=generator))
    values[torch.rand(size, generator=generator) < 0.05] = 0
    return values if moment == MOMENTS[0] else values.square()


def encoded(values: Tensor, moment: str) -> tuple[Tensor, Tensor]:
    codes, scales = torch.zeros(len(values), dtype=torch.uint8), torch.zeros(moments.blocks_of(len(values)))
    CodeTable.of(moment, CPU).encode(values.clone(), codes, scales)
    return codes, scales


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_table_is_the_dynamic_tree(moment: str) -> None:
    exact, table = dynamic_tree(moment), CodeTable.of(moment, CPU)
    assert len(exact) == 256 and torch.equal(table.values, exact.float())
    assert torch.equal(table.middles, ((exact[1:] + exact[:-1]) / 2).float())


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [1.0, 1e-15, 1e12])
def test_a_code_is_the_nearest_value_times_the_largest_of_its_block(moment: str, size: int, factor: float) -> None:
    values = spread(size, moment) * factor
    codes, scales = encoded(values, moment)
    table, found = dynamic_tree(moment), CodeTable.of(moment, CPU).decode(codes, scales)
    assert found.dtype == torch.float32 and len(scales) == -(-size // BLOCK)
    for block, code, scale in zip(values.split(BLOCK), codes.split(BLOCK), scales, strict=True):
        assert scale == block.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        distance = (block.double()[:, None] / scale.double() - table).abs()
        own = distance.gather(1, code.long()[:, None])[:, 0]
        assert (own <= distance.min(1).values + 1e-7 * table[code.long()].abs()).all(), "but for ties"
    exact = table[codes.long()] * scales.double().repeat_interleave(BLOCK)[:size]
    assert ((found.double() - exact).abs() <= 2e-7 * exact.abs()).all()
    assert (found[values == 0] == 0).all()


@pytest.mark.parametrize("moment", MOMENTS)
def test_blocks_do_not_see_each_other(moment: str) -> None:
    """The last one may be short, and one without any number that is not 0 has no part in the others."""
    values = torch.cat([spread(BLOCK, moment, 1) * 1e6, torch.zeros(BLOCK), spread(99, moment, 2) * 1e-6])
    codes, scales = encoded(values, moment)
    for part, start in zip(values.split(BLOCK), range(0, len(values), BLOCK), strict=True):
        alone, scale = encoded(part, moment)
        assert torch.equal(codes[start : start + BLOCK], alone) and scale[0] == scales[start // BLOCK]
    assert (CodeTable.of(moment, CPU).decode(codes, scales)[BLOCK : 2 * BLOCK] == 0).all()


def made(value: Tensor) -> AdamW8bit:
    parameter = nn.Parameter(value.clone())
    return AdamW8bit([parameter], [parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


def parameter_of(optimizer: AdamW8bit) -> nn.Parameter:
    found: nn.Parameter = optimizer.param_groups[0]["params"][0]
    return found


def decoded(optimizer: AdamW8bit) -> dict[str, Tensor]:
    state = optimizer.state[parameter_of(optimizer)]
    codes = {moment: (state[moment].view(-1), state[moment + SCALE]) for moment in MOMENTS}
    shape = parameter_of(optimizer).shape
    return {moment: CodeTable.of(moment, CPU).decode(*given).view(shape) for moment, given in codes.items()}


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 4


@pytest.mark.parametrize("shape", [(37, 130), (16, 256)])
@pytest.mark.parametrize("at_once", [512, 1 << 24])
def test_a_step_is_that_of_adamw_from_what_codes_stand_for(
    shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own optimizer, given the moments as they are decoded; what it leaves of them is encoded. In pieces."""
    monkeypatch.setattr(moments, "AT_ONCE", at_once)
    ours = made(torch.randn(shape, generator=torch.Generator().manual_seed(7)))
    value = parameter_of(ours)
    for step in range(4):
        other = nn.Parameter(value.detach().clone())
        theirs = torch.optim.AdamW([other], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
        if step:
            theirs.state[other] = {STEP: torch.tensor(float(step)), **decoded(ours)}
        value.grad = gradient(shape, step)
        other.grad = value.grad.clone()
        ours.step()
        theirs.step()
        assert ours.state[value][STEP] == step + 1
        torch.testing.assert_close(value.detach(), other.detach(), rtol=1e-6, atol=1e-8)
        for moment in MOMENTS:
            codes, scales = encoded(theirs.state[other][moment].flatten(), moment)
            wrong = codes.int() - ours.state[value][moment].flatten().int()
            assert int(wrong.abs().max()) <= 1 and float((wrong != 0).float().mean()) < 1e-3, "but for ties"
            torch.testing.assert_close(ours.state[value][moment + SCALE], scales, rtol=1e-6, atol=0)


def reach(moment: str) -> Tensor:
    """[256] how far what becomes a code may be from what it stands for, as a part of the scale."""
    table = dynamic_tree(moment)
    middles = (table[1:] + table[:-1]) / 2
    lowest = -1.0 if moment == MOMENTS[0] else 0.0
    edges = torch.cat([torch.tensor([lowest]), middles, torch.ones(1)])
    return torch.maximum(table - edges[:-1], edges[1:] - table)


def test_the_distance_to_adamw_in_float64_is_bounded_by_that_of_the_codes() -> None:
    """A moment is off by what was there before, decayed, and what its code may be off by; an update then lies between
    those of the corners of what both moments may be. Over twenty steps."""
    size, steps = 8 * 256, 20
    start = torch.randn(size, generator=torch.Generator().manual_seed(3))
    ours = made(start)
    value, exact, zero = parameter_of(ours), start.double(), torch.zeros(size, dtype=torch.float64)
    first, second, error, off = zero, zero, dict.fromkeys(MOMENTS, zero), zero
    for step in range(1, steps + 1):
        value.grad = gradient((size,), step)
        ours.step()
        grad = value.grad.double()
        first, second = (beta * old + (1 - beta) * new
                         for beta, old, new in zip(BETAS, (first, second), (grad, grad.square()), strict=True))
        error = {moment: beta * error[moment] for moment, beta in zip(MOMENTS, BETAS, strict=True)}
        corners = [
            (first + a * error[MOMENTS[0]]) / (1 - BETAS[0] ** step)
            / (((second + b * error[MOMENTS[1]]).clamp(min=(1 - BETAS[1]) * grad.square()) / (1 - BETAS[1] ** step))
               .sqrt() + EPS)
            for a, b in itertools.product((-1, 1), repeat=2)
        ]
        right = first / (1 - BETAS[0] ** step) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPS)
        off = off * (1 - LR * DECAY) + LR * torch.stack([(corner - right).abs() for corner in corners]).amax(0)
        exact = exact * (1 - LR * DECAY) - LR * right
        now = decoded(ours)
        for moment, wanted in zip(MOMENTS, (first, second), strict=True):
            scale = ours.state[value][moment + SCALE].double().repeat_interleave(BLOCK)
            error[moment] = error[moment] + reach(moment)[ours.state[value][moment].long()] * scale
            assert ((now[moment].double() - wanted).abs() <= error[moment] * (1 + 1e-5)).all()
        assert ((value.detach().double() - exact).abs() <= off + 1e-6 * step).all()
    moved = (exact - start.double()).abs()
    typical = (value.detach().double() - exact).abs().median()
    assert typical < 0.1 * moved.median() and off.median() < moved.median(), "and the bound says something"


def test_small_parameters_are_those_of_adamw() -> None:
    """Both kinds in one optimizer; one that has no gradient has no state."""
    values = [nn.Parameter(torch.randn(size)) for size in (8192, 100, 300)]
    optimizer = AdamW8bit(values, values[:1], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    other = nn.Parameter(values[1].detach().clone())
    theirs = torch.optim.AdamW([other], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    for step in range(3):
        values[0].grad, values[1].grad = gradient((8192,), step), gradient((100,), step)
        other.grad = gradient((100,), step)
        optimizer.step()
        theirs.step()
    assert torch.equal(values[1], other) and values[2] not in optimizer.state
    for moment in MOMENTS:
        assert torch.equal(optimizer.state[values[1]][moment], theirs.state[other][moment])
    assert optimizer.state[values[0]].keys() == {STEP, *MOMENTS, *(moment + SCALE for moment in MOMENTS)}


def test_which_moments_are_codes_and_what_they_take() -> None:
    chosen = load_recipe("flare").override(["optimizer.moments=8bit"])
    values = {
        "matrix": torch.empty(64, 64, dtype=torch.bfloat16), "wide": torch.empty(LEAST), "norm": torch.empty(LEAST - 1),
        "double": torch.empty(LEAST, dtype=torch.float64),
    }
    assert names_in_codes(chosen, values) == {"matrix", "wide"}
    assert names_in_codes(load_recipe("flare"), values) == frozenset()
    assert moment_bytes(1 << 20, torch.float32, True) == 2 * ((1 << 20) + 4 * (1 << 12))
    assert moment_bytes(1 << 20, torch.float32, False) == 8 << 20
    assert moment_bytes(257, torch.float32, True) == 2 * (257 + 8)
