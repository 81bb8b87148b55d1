"""Noise: stratified rates, kinds, determinism."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flarec.recipe import load_recipe
from flarec.train.objective.noise import draw_noise, step_generator, stratified_rates


@given(st.integers(1, 300), st.integers(0, 2**31))
def test_one_rate_in_every_stratum(count: int, seed: int) -> None:
    rates = stratified_rates(count, step_generator(seed, 0))
    strata = (rates.sort().values * count).floor().clamp_max(count - 1)
    assert strata.tolist() == list(range(count))


def test_rates_are_shuffled_and_uniform_inside_their_stratum() -> None:
    rates = stratified_rates(20_000, step_generator(0, 0))
    order = torch.corrcoef(torch.stack([torch.arange(20_000, dtype=torch.float64), rates]))[0, 1]
    assert abs(float(order)) < 0.03
    inside = (rates * 20_000) % 1
    assert abs(float(inside.mean()) - 0.5) < 0.01 and abs(float(inside.var()) - 1 / 12) < 0.003


def test_same_seed_and_step_give_the_same_noise_and_others_do_not() -> None:
    diffusion = load_recipe("dual").diffusion

    def masked(seed: int, step: int) -> torch.Tensor:
        return draw_noise(500, diffusion, step_generator(seed, step)).masked

    torch.manual_seed(1)
    first = masked(3, 7)
    state = torch.get_rng_state()
    assert torch.equal(first, masked(3, 7))
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    for other in [(3, 8), (4, 7), (7, 3), (37, 0)]:
        assert not torch.equal(first, masked(*other))


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_kinds_follow_their_probability(probability: float) -> None:
    diffusion = load_recipe("dual").override([f"diffusion.second.probability={probability}"]).diffusion
    noise = draw_noise(20_000, diffusion, step_generator(0, 0))
    names = [kind.mask for _, kind in diffusion.kinds]
    is_all = torch.tensor([names[kind] == "all" for kind in noise.kinds.number.tolist()])
    assert abs(float(is_all.double().mean()) - probability) < 0.01
    assert bool(noise.masked[is_all].all())
    rest = noise.masked[~is_all]
    if len(rest):
        assert abs(float(rest.double().mean()) - 0.5) < 0.01
        counts = torch.bincount(rest.sum(1), minlength=5).double() / len(rest)
        # A rate uniform on [0, 1] makes every number of masked positions equally likely: 1 / (B + 1).
        assert torch.allclose(counts, torch.full((5,), 0.2, dtype=torch.float64), atol=0.015)


def test_no_blocks() -> None:
    noise = draw_noise(0, load_recipe("dual").diffusion, step_generator(0, 0))
    assert noise.kinds.number.shape == (0,) and noise.masked.shape == (0, 4)
