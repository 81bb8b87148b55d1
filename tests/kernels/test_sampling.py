"""The choice of a token: the same bits from the loop, from PyTorch and from Triton, on every device."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from flarec.base.generation import GenerationOptions
from flarec.errors import UsageError
from flarec.kernels.sampling import (
    MOST_TOKENS,
    UNCHOSEN,
    arithmetic,
    choose,
    mask_of,
    near,
    random_ids,
    reference,
    torch_choice,
)
from flarec.kernels.sampling.triton_choice import SamplingLaunch, choose_rows, launch_of
from tests.decode.oracles import gumbel, law

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
OFF = 2**62
Settings = tuple[float, int, float]  # temperature, top_k, top_p
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def rows_of(settings: list[Settings], seed: int = 0, device: str = "cpu") -> Operands:
    """Operands of `choose` behind the logits, before `suppress`."""
    draw = random.Random(seed)
    temperature, top_k, top_p = zip(*settings, strict=True)
    words = [[draw.randrange(2**63) for _ in settings], [draw.randrange(10**6) for _ in settings]]
    made = [torch.tensor(x, device=device) for x in (temperature, top_k, top_p, *words)]
    return made[0], made[1], made[2], made[3], made[4]


def hidden(ids: list[int], vocab: int) -> Tensor:
    mask = mask_of(ids, vocab, "cpu")
    assert mask is not None
    return mask


def logits_of(rows: int, vocab: int, seed: int = 0, step: float = 0.0) -> Tensor:
    """step > 0: multiples of it, so that many tokens are equal."""
    values = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    return (values / step).round() * step if step else values


def same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Bit for bit where there is a choice."""
    ok = wanted[2].cpu()
    assert torch.equal(got[2].cpu(), ok)
    assert torch.equal(got[0].cpu()[ok], wanted[0].cpu()[ok])
    assert torch.equal(got[1].cpu()[ok], wanted[1].cpu()[ok])


def ulps(got: Tensor, exact: np.ndarray) -> float:
    return float((np.abs(got.double().numpy() - exact) / np.spacing(np.abs(exact).astype(np.float32))).max())


def test_logarithm_and_weights_are_accurate() -> None:
    """Against float64: a logarithm to two units in the last place; a weight to those and to the last of its 42 bits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.exp2(torch.rand(200_000, generator=generator) * 60 - 42)
    x = torch.cat([x, 1 + torch.linspace(-0.3, 0.42, 200_001), torch.tensor([2.0**-41, 1.0, 16.6, 1 - 2.0**-24])])
    exact = np.log(x.double().numpy())
    assert ulps(arithmetic.log(x)[exact != 0], exact[exact != 0]) < 2
    assert arithmetic.log(torch.ones(1)) == 0
    u = torch.cat([torch.exp2(-torch.rand(200_000, generator=generator) * 41), torch.tensor([2.0**-41, 1 - 2.0**-24])])
    u = u.clamp_max(1 - 2.0**-24)
    wanted = -np.log(-np.log1p(-u.double().numpy()))
    assert float(np.abs(arithmetic.gumbel_of(u).double().numpy() - wanted).max()) < 4e-6
    below = torch.cat([torch.rand(200_000, generator=generator) * 30, torch.tensor([0.0, 1e-30, 41.9, 100, math.inf])])
    found = arithmetic.weights(below).double().numpy()
    exact = 2.0**42 * np.exp(-below.double().numpy())
    assert bool((np.abs(found - exact) <= 1 + 4e-6 * exact).all())
    assert found[-5] == 2**42 and found[-1] == 0


CASES: list[list[Settings]] = [
    [(0.0, OFF, 1.0), (0.7, OFF, 1.0), (1.0, 1, 0.5)],
    [(0.7, 3, 0.9), (1.3, 20, 1.0), (2.0, OFF, 0.4)],
    [(1e-45, 5, 0.5), (1e6, 5, 0.99), (1.0, 7, 1e-9)],
]


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_pytorch_is_the_loop(settings: list[Settings], step: float) -> None:
    for seed in range(12):
        given, logits = rows_of(settings, seed), logits_of(3, 40, seed, step)
        out = hidden([3, 39], 40)
        wanted = reference.choose(logits, *given, out.expand(3, -1))
        token, probability, ok = torch_choice.choose_rows(logits, *given, out, True, True)
        assert ok.all()
        for n, row in enumerate(wanted):
            assert row is not None
            assert int(token[n]) == row[0] and probability[n] == torch.tensor(row[1], dtype=torch.float32)


SMALL = SamplingLaunch(32, cap=4, parts=2, piece=64, few=8, strip=4)
"""Tiles of 32 tokens that keep 4; pools of up to 8 are few."""


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ([(0.0, OFF, 1.0), (0.8, OFF, 1.0)], 0.5),  # nothing is cut off
        ([(0.7, 3, 1.0)], 0.0),  # top-k from the pool
        ([(0.7, 4, 0.6)], 1.0),  # and top-p; equal logits where both cut
        ([(1.0, 9, 0.9)], 0.0),  # more than a tile keeps: the row is read again
        ([(1.0, OFF, 0.2)], 0.0),  # top-p from the pool
        ([(3.0, OFF, 0.97)], 1.0),  # top-p keeps more than the pool holds
        ([(1.0, 2, 1.0), (1.0, 4, 0.9), (1.0, 4, 1.0), (1.0, 1, 0.5)], 8.0),  # far more equal ones than are kept
        ([(0.9, 4, 0.8)], 100.0),  # all tokens are equal
    ],
)
def test_triton_is_pytorch(settings: list[Settings], step: float) -> None:
    vocab = 75
    given, logits = rows_of(settings), logits_of(len(settings), vocab, 5, step).bfloat16()
    out = hidden([2, 71], vocab)
    wanted = torch_choice.choose_rows(logits, *given, out, True, True)
    assert wanted[2].all()
    moved = rows_of(settings, device=DEVICE)
    same(choose_rows(logits.to(DEVICE), *moved, out.to(DEVICE), True, True, launch=SMALL), wanted)


@pytest.mark.parametrize("sampled", [True, False])
def test_rows_of_logits_and_shared_settings(sampled: bool) -> None:
    """Choices that follow one another share settings, and read any rows of logits: as with settings of their own."""
    vocab, per, source = 70, 3, torch.tensor([4, 0, 0, 2, 3, 1])
    settings = [(0.0, 3, 0.5), (1.0, 4, 0.7)] if sampled else [(0.0, OFF, 1.0)] * 2
    given, logits = rows_of(settings), logits_of(5, vocab, 2, 0.5)
    out = torch.zeros(5, vocab, dtype=torch.bool)
    out[3, logits[3].argmax()] = True
    *alone, position = (x.repeat_interleave(per) for x in given)
    hot, top_k, top_p, seed = alone
    position += torch.arange(per).repeat(2)
    wanted = torch_choice.choose_rows(
        logits[source], hot, top_k, top_p, seed, position, out[source], True, sampled
    )
    moved, there = rows_of(settings, device=DEVICE), (logits.to(DEVICE), source.to(DEVICE), out.to(DEVICE))
    for confidence in (True, False):
        for name in ("torch", "triton"):
            found = choose(
                there[0], *moved, there[2], sampled=sampled, per=per, source=there[1], confidence=confidence,
                implementation=name,
            )
            assert torch.equal(found.token.cpu(), wanted[0])
            assert torch.equal(found.probability.cpu(), wanted[1] if confidence else torch.zeros(6))
    launched = choose_rows(there[0], *moved, there[2], True, sampled, per=per, source=there[1], launch=SMALL)
    same(launched, wanted)


def test_masks_of_rows_and_rows_without_a_choice() -> None:
    """A mask per row, logits that lie apart in memory, and NaN or infinity where it counts and where it does not."""
    wide = logits_of(5, 64, 1)
    wide[0, 10] = math.nan
    wide[1, 10] = math.nan
    wide[2, 5] = math.inf
    wide[3] = -math.inf
    out = torch.zeros(5, 32, dtype=torch.bool)
    out[1, 5] = True
    wide[4, 10] = -math.inf
    given = rows_of([(1.0, OFF, 1.0)] * 5)
    logits = wide[:, ::2]
    moved = rows_of([(1.0, OFF, 1.0)] * 5, device=DEVICE)
    found = choose(logits.to(DEVICE), *moved, out.to(DEVICE), implementation="triton")
    assert found.ok.tolist() == [False, True, True, False, True]
    assert found.token[~found.ok].tolist() == [UNCHOSEN] * 2 and not found.probability[~found.ok].any()
    wanted = choose(logits, *given, out, implementation="torch")
    assert torch.equal(found.token.cpu(), wanted.token) and torch.equal(found.probability.cpu(), wanted.probability)
    assert found.token[4] != 5


def test_hints_change_nothing() -> None:
    logits = logits_of(20, 50)
    given = rows_of([(0.0, OFF, 1.0)] * 20)
    plain = choose(logits, *given)
    for sampled, truncated in ((False, True), (True, False), (False, False)):
        found = choose(logits, *given, sampled=sampled, truncated=truncated)
        assert all(map(torch.equal, found, plain))
    assert torch.equal(plain.token, logits.argmax(dim=1))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_who_reads_no_probability_gets_the_same_tokens(implementation: str) -> None:
    logits = logits_of(3, 20).to(DEVICE)
    given = rows_of([(0.0, OFF, 1.0), (0.7, 3, 0.8), (0.7, 9, 1.0)], device=DEVICE)
    found = choose(logits, *given, implementation=implementation, confidence=False)
    assert torch.equal(found.token, choose(logits, *given, implementation=implementation).token)
    assert not found.probability.any()


def test_a_compiler_sees_one_op() -> None:
    given = rows_of([(0.7, 5, 0.9)] * 3)
    logits, out = logits_of(3, 50), hidden([1], 50)

    def step(scores: Tensor) -> Tensor:
        return choose(scores + 0, *given, out).token + 1

    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(logits), step(logits))


@pytest.mark.parametrize("settings", [*CASES, [(0.0, OFF, 1.0), (0.7, OFF, 1.0), (1.7, OFF, 1.0)]])
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_what_is_nearly_as_good_as_the_choice(settings: list[Settings], step: float) -> None:
    """Every token of a row, against scores in float64; a share of 1 leaves the choice alone, also among equal ones."""
    vocab, seen = 20, {True: 0, False: 0}
    for seed in range(4):
        given, logits = rows_of(settings, seed, DEVICE), logits_of(3, vocab, seed, step).to(DEVICE)
        never = [3, 19]
        out = hidden(never, vocab).to(DEVICE)
        choice = choose(logits, *given, out).token
        kept = [reference_kept(logits[n], settings[n], never) for n in range(3)]
        for share in (0.01, 0.5, 1.0):
            found = torch.stack([
                near(logits, torch.full_like(choice, token), choice, share, *given, out) for token in range(vocab)
            ], dim=1)
            for n, (temperature, *_) in enumerate(settings):
                noise = [gumbel(int(given[3][n]), int(given[4][n]), token) for token in range(vocab)]
                scores = [value + temperature * noise[token] for token, value in enumerate(logits[n].tolist())]
                own = int(choice[n])
                for token in range(vocab):
                    gap = (scores[own] - scores[token]) / (temperature or 1.0)
                    if token != own and abs(gap + math.log(share)) < 1e-4:
                        continue
                    wanted = token == own or (token in kept[n] and gap < -math.log(share))
                    assert bool(found[n, token]) == wanted
                    seen[wanted] += token != own
            if share == 1:
                assert found.sum() == 3 and found.gather(1, choice[:, None]).all()
    assert seen[False] and (seen[True] or settings == CASES[2])


def reference_kept(logits: Tensor, settings: Settings, never: list[int]) -> set[int]:
    """Tokens that top-k and top-p keep, in float64."""
    temperature, top_k, top_p = settings
    options = GenerationOptions(temperature=temperature, top_k=0 if top_k == OFF else top_k, top_p=top_p)
    return set(law(logits.tolist(), options, never))


def test_no_choice_is_near_nothing() -> None:
    given, logits = rows_of([(0.0, OFF, 1.0), (1.0, OFF, 1.0)]), logits_of(2, 8)
    logits[0, 1] = math.nan
    choice = choose(logits, *given).token
    assert near(logits, choice.clamp_min(0), choice, 0.5, *given).tolist() == [False, True]
    assert near(logits, choice, choice, 0.5, *given).tolist() == [False, True]


def test_limits() -> None:
    with pytest.raises(UsageError, match="too large to choose from"):
        choose(torch.empty(1, MOST_TOKENS + 1), *rows_of([(1.0, OFF, 1.0)]))
    assert mask_of([], 5, "cpu") is None
    for vocab in (1, 9, 1000, 4097, 151936, 248320, MOST_TOKENS):
        launch = launch_of(vocab)
        tiles = launch.tiles(vocab)
        assert tiles * launch.block >= vocab and 1 <= launch.cap <= launch.block and tiles * launch.cap <= 8192


LARGE: list[Settings] = [
    (0.0, OFF, 1.0), (0.7, OFF, 1.0), (0.7, 20, 1.0), (0.7, 20, 0.95), (1.0, OFF, 0.9), (1.5, 100, 0.5),
    (1.0, 1000, 0.9), (2.0, OFF, 0.99), (1.0, 50, 1.0), (0.6, 20, 0.95), (1e-6, 20, 0.95), (1.0, 1, 1.0),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_does_not_change_a_choice(dtype: torch.dtype) -> None:
    """A real vocabulary, flat and peaked rows: CPU, CUDA through PyTorch, and Triton, also from a CUDA graph."""
    vocab = 248320
    for scale in (1.0, 4.0):
        logits = (logits_of(len(LARGE), vocab, int(scale)) / 3 * scale).to(dtype)
        given, out = rows_of(LARGE), hidden([0, 248077], vocab)
        wanted = choose(logits, *given, out)
        moved, there, mask = rows_of(LARGE, device="cuda"), logits.cuda(), out.cuda()
        for implementation in ("torch", "triton"):
            same(choose(there, *moved, mask, implementation=implementation), wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = choose(there, *moved, mask)
        moved[4].add_(1)  # the next position
        graph.replay()
        given[4].add_(1)
        same(found, choose(logits, *given, out))


def test_random_ids_are_those_of_the_loop_and_uniform() -> None:
    draw = random.Random(3)
    pool, seeds = sorted(draw.sample(range(10**6), 37)), [0, 1, -1, draw.randrange(2**63), -(2**63)]
    places = [[draw.choice([0, 1, draw.randrange(2**31)]) for _ in range(6)] for _ in seeds]
    found = random_ids(torch.tensor(seeds), torch.tensor(places), torch.tensor(pool))
    wanted = [
        [reference.random_id(seed % reference.WORD, place, pool) for place in row]
        for seed, row in zip(seeds, places, strict=True)
    ]
    assert found.tolist() == wanted

    if CUDA:
        there = random_ids(torch.tensor(seeds).cuda(), torch.tensor(places).cuda(), torch.tensor(pool).cuda())
        assert there.tolist() == wanted

    many = random_ids(torch.arange(40), torch.arange(1000).expand(40, -1), torch.arange(7))
    counts = torch.bincount(many.flatten(), minlength=7).double()
    expected = many.numel() / 7
    assert float(((counts - expected) ** 2 / expected).sum()) < 22.5  # chi squared, 6 degrees: 0.1 %
    assert not torch.equal(many[0], many[1])
    alone = random_ids(torch.tensor([5]), torch.tensor([[9, 9]]), torch.arange(1000))
    assert alone[0, 0] == alone[0, 1]
