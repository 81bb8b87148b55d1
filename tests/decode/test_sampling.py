"""The noise is uniform, independent and bit-stable; the sampler follows the truncated softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flarec.base.fields import LARGEST
from flarec.base.generation import HOTTEST, GenerationOptions
from flarec.decode.sampling import UNCHOSEN, SamplingRows, choose
from flarec.kernels.sampling.arithmetic import gumbel, gumbel_of, to_unit, uniform, weights
from flarec.kernels.sampling.torch_choice import kept_tokens
from tests.decode import oracles

WORDS = st.integers(0, 2**63 - 1)


def ks_distance(sample: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance to the uniform law, times sqrt(n): above 1.95 with probability 0.001."""
    ordered = np.sort(sample.astype(np.float64))
    n = len(ordered)
    grid = np.arange(n + 1) / n
    return float(max((grid[1:] - ordered).max(), (ordered - grid[:-1]).max())) * math.sqrt(n)


def draw(seeds: int, positions: int, tokens: int) -> np.ndarray:
    """[seeds, positions, tokens] uniforms of consecutive counters, the worst case for a weak hash."""
    seed = torch.arange(seeds).repeat_interleave(positions)
    position = torch.arange(positions).repeat(seeds)
    return uniform(seed, position, torch.arange(tokens)).reshape(seeds, positions, tokens).double().numpy()


@given(seed=WORDS, position=st.integers(0, 2**40), token=st.integers(0, 2**20))
def test_uniform_is_the_integer_hash(seed: int, position: int, token: int) -> None:
    value = uniform(torch.tensor([seed]), torch.tensor([position]), torch.tensor([token])).item()
    exact = oracles.uniform(seed, position, token)
    assert 0 < value < 1
    assert abs(value - exact) <= 2.0**-24 * exact


def test_extreme_words_stay_inside_the_unit_interval() -> None:
    """The conversion of the largest and smallest words, which no search finds."""
    value = to_unit(torch.tensor([0, -1]))
    assert value[0] == 2.0**-41 and value[1] == 1 - 2.0**-24
    assert torch.isfinite(gumbel_of(value)).all()


@pytest.mark.parametrize("axis", ["seed", "position", "token", "all"])
def test_uniformity_along_every_axis(axis: str) -> None:
    n = 20_000
    shape = {"seed": (n, 1, 1), "position": (1, n, 1), "token": (1, 1, n), "all": (40, 40, 40)}[axis]
    sample = draw(*shape).ravel()
    assert ks_distance(sample) < 1.95
    counts = np.bincount((sample * 256).astype(int), minlength=256)
    expected = len(sample) / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < 3.3 * math.sqrt(2 * 255)


def test_low_bits_are_uniform_too() -> None:
    sample = draw(1, 30, 1000).ravel()
    assert ks_distance(np.modf(sample * 2**10)[0]) < 1.95
    small = sample[sample < 2**-6] * 2**6  # the tail that decides an argmax
    assert ks_distance(small) < 1.95


def test_neighbours_are_independent() -> None:
    """Correlation and joint cells of neighbouring counters on each axis, and between equal counters of other axes."""
    block = draw(50, 50, 50)
    pairs = [(np.take(block, range(49), axis), np.take(block, range(1, 50), axis)) for axis in range(3)]
    pairs += [(block, block.swapaxes(a, b)) for a, b in ((0, 1), (0, 2), (1, 2))]
    off = np.triu(np.ones((50, 50), dtype=bool), 1)
    masks = [None] * 3 + [
        np.broadcast_to(off[:, :, None], block.shape),
        np.broadcast_to(off[:, None, :], block.shape),
        np.broadcast_to(off[None, :, :], block.shape),
    ]
    for (first, second), mask in zip(pairs, masks, strict=True):
        x, y = (first.ravel(), second.ravel()) if mask is None else (first[mask], second[mask])
        n = len(x)
        assert abs(np.corrcoef(x, y)[0, 1]) * math.sqrt(n) < 3.9
        cells = np.bincount((x * 16).astype(int) * 16 + (y * 16).astype(int), minlength=256)
        chi_square = float(((cells - n / 256) ** 2 / (n / 256)).sum())
        assert abs(chi_square - 255) < 3.9 * math.sqrt(2 * 255)


def test_every_seed_bit_changes_the_noise() -> None:
    base, bits = 0x123456789ABCDEF, range(63)
    seeds = torch.tensor([base] + [base ^ (1 << bit) for bit in bits])
    values = uniform(seeds, torch.zeros(64, dtype=torch.int64), torch.arange(2000)).double().numpy()
    correlation = np.corrcoef(values)
    assert np.abs(correlation - np.eye(64)).max() < 5 / math.sqrt(2000)


def test_gumbel_moments() -> None:
    noise = gumbel(torch.arange(100), torch.arange(100), torch.arange(2000)).double().numpy().ravel()
    n = len(noise)
    assert abs(noise.mean() - 0.5772156649) < 4 * math.pi / math.sqrt(6 * n)
    assert abs(noise.var() - math.pi**2 / 6) < 0.03


@given(
    logits=st.lists(st.lists(st.integers(-8, 8), min_size=9, max_size=9), min_size=1, max_size=5),
    data=st.data(),
)
def test_choose_equals_the_oracle(logits: list[list[int]], data: st.DataObject) -> None:
    """Integer logits make ties frequent; quarters of the temperature keep the scaling exact."""
    rows = len(logits)
    params = [
        GenerationOptions(
            temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
            top_k=data.draw(st.sampled_from([0, 1, 2, 5, 100])),
            top_p=data.draw(st.sampled_from([1.0, 0.83, 0.31, 1e-9])),
            seed=data.draw(WORDS),
        )
        for _ in range(rows)
    ]
    positions = [data.draw(st.integers(0, 10**6)) for _ in range(rows)]
    suppress = data.draw(st.lists(st.integers(0, 8), max_size=2, unique=True))
    token, probability = choose(
        torch.tensor(logits, dtype=torch.float32), SamplingRows.build(params), torch.tensor(positions), suppress
    )
    for row in range(rows):
        expected, confidence = oracles.pick(logits[row], params[row], positions[row], suppress)
        assert token[row] == expected
        assert probability[row].item() == pytest.approx(confidence, rel=1e-5)


@given(st.data())
def test_a_row_does_not_depend_on_the_others(data: st.DataObject) -> None:
    """Also where the others switch the noise or the sort on."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = torch.randn(6, 301, generator=generator) * 3
    logits[0, 10:] = -40  # a tail whose probabilities vanish in a rounded sum
    params = [
        GenerationOptions(
            temperature=data.draw(st.sampled_from([0.0, 0.7, 1.0])),
            top_k=data.draw(st.sampled_from([0, 7])),
            top_p=p,
            seed=row,
        )
        for row, p in enumerate([1.0, *data.draw(st.tuples(*[st.sampled_from([1.0, 0.5])] * 5))])
    ]
    positions = torch.arange(6)
    token, probability = choose(logits, SamplingRows.build(params), positions, [3])
    for row in range(6):
        alone = slice(row, row + 1)
        t, p = choose(logits[alone], SamplingRows.build(params[alone]), positions[alone], [3])
        assert torch.equal(t, token[alone]) and torch.equal(p, probability[alone])


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0}, {"temperature": 0.6}, {"temperature": 1.4, "top_k": 5}, {"temperature": 1.0, "top_p": 0.7}],
)
def test_frequencies_follow_the_law(options: dict) -> None:
    n, vocab, params = 40_000, 12, GenerationOptions(**options)
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(0)) * 1.5
    rows = SamplingRows.build([params]).take(torch.zeros(n, dtype=torch.int64))
    token, _ = choose(logits.expand(n, vocab), rows, torch.arange(n), [2])
    counts = np.bincount(token.numpy(), minlength=vocab)
    law = oracles.law(logits.tolist(), params, [2])
    assert set(np.flatnonzero(counts)) <= set(law)
    chi_square = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in law.items())
    freedom = len(law) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_temperature_zero_is_the_limit_and_tiny_temperatures_stay_finite() -> None:
    logits = torch.randn(50, 100, generator=torch.Generator().manual_seed(1)) * 50
    rows = torch.arange(50)
    for temperature in (0.0, 2e-38, 1e-30, 1e-6):
        params = SamplingRows.build([GenerationOptions(temperature=temperature, top_p=0.9)] * 50)
        token, probability = choose(logits, params, rows)
        assert torch.equal(token, logits.argmax(dim=1)) and probability.isfinite().all()


def test_equal_logits_are_kept_by_id() -> None:
    """Few distinct values in a large vocabulary, where an unstable sort would show."""
    logits = torch.randint(0, 3, (4, 5000), generator=torch.Generator().manual_seed(3)).float()
    top_k, top_p = torch.tensor([1, 700, 2500, 2**62]), torch.tensor([1.0, 1.0, 1.0, 1e-60])
    keep = kept_tokens(logits, weights(logits.amax(dim=1, keepdim=True) - logits), top_k, top_p)
    for row, kept in enumerate([1, 700, 2500, 1]):
        order = sorted((-value, token) for token, value in enumerate(logits[row].tolist()))
        assert set(keep[row].nonzero()[:, 0].tolist()) == {token for _, token in order[:kept]}


def test_low_precision_logits_are_sampled_in_float32() -> None:
    logits = torch.randn(20, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    params = SamplingRows.build([GenerationOptions(temperature=1.0, seed=i) for i in range(20)])
    low, high = (choose(x, params, torch.arange(20)) for x in (logits, logits.float()))
    assert torch.equal(low[0], high[0]) and torch.equal(low[1], high[1]) and low[1].dtype == torch.float32


LOGITS = st.sampled_from([0.0, -1.0, 3.0, 1e4, -1e4, 3e38, -3e38, 1e-40, math.inf, -math.inf, math.nan])


@given(st.lists(st.lists(LOGITS, min_size=6, max_size=6), min_size=1, max_size=4), st.data())
def test_a_suppressed_id_never_wins(logits: list[list[float]], data: st.DataObject) -> None:
    """Whatever the numbers; a row that has no finite best choice gives none, and its probability is 0."""
    suppress = data.draw(st.lists(st.integers(0, 5), max_size=6, unique=True))
    options = [
        GenerationOptions(
            temperature=data.draw(st.sampled_from([0.0, 1e-45, 1e-30, 1.0, 1e3, HOTTEST])),
            top_k=data.draw(st.sampled_from([0, 1, 3, LARGEST])),
            top_p=data.draw(st.sampled_from([1.0, 0.5, 1e-300])),
            seed=data.draw(WORDS),
        )
        for _ in logits
    ]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    positions = torch.arange(len(logits)) * 10**9
    token, probability = choose(torch.tensor(logits, dtype=dtype), SamplingRows.build(options), positions, suppress)
    for row, values in enumerate(logits):
        left = [value for index, value in enumerate(values) if index not in suppress]
        finite = torch.tensor(left, dtype=dtype).float()
        if len(finite) and math.isfinite(float(finite.max())):  # NaN is the largest of all to torch
            assert int(token[row]) not in suppress and values[int(token[row])] > -math.inf
            assert 0 <= float(probability[row]) <= 1 + 1e-6
        else:
            assert (int(token[row]), float(probability[row])) == (UNCHOSEN, 0)


def test_the_highest_temperature_is_uniform() -> None:
    n, vocab = 20_000, 8
    rows = SamplingRows.build([GenerationOptions(temperature=HOTTEST)]).take(torch.zeros(n, dtype=torch.int64))
    token, _ = choose(torch.randn(vocab).expand(n, vocab), rows, torch.arange(n), [5])
    counts = np.bincount(token.numpy(), minlength=vocab)
    assert counts[5] == 0
    assert abs(counts[counts > 0] - n / 7).max() < 5 * math.sqrt(n / 7)


@pytest.mark.gpu
def test_the_device_does_not_change_the_noise() -> None:
    seed, position = torch.arange(64) * 2**50, torch.arange(64) * 1000
    ids = torch.arange(50_000)
    assert torch.equal(uniform(seed, position, ids), uniform(seed.cuda(), position.cuda(), ids.cuda()).cpu())
