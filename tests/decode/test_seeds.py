"""A request's text is a function of its prompt, its seed and its settings, in both exact modes.

Whatever runs beside it. And the seeds are independent draws: over many of them one row's tokens follow its softmax.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from flarec.base.generation import GenerationOptions
from flarec.decode import Engine
from flarec.decode.sampling import SamplingRows, choose
from tests.decode import oracles
from tests.test_invariants import MASK, subject

SETTINGS = [
    GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=40 + number, max_new_tokens=8)
    for number, (temperature, top_k, top_p) in enumerate([
        (0.3, 0, 1.0), (0.7, 0, 0.9), (1.0, 0, 1.0), (1.0, 5, 1.0), (1.3, 20, 0.8), (2.0, 0, 1.0), (2.0, 3, 0.5),
        (0.0, 0, 1.0),
    ])
]


def test_a_request_alone_and_in_a_batch_of_eight() -> None:
    """Each of eight settings once alone, once among the seven others, prompts of other lengths; causal and AR-Trust."""
    its = subject("qwen3_5_text")
    engine = Engine(
        its.decode, mask_token_id=MASK, block_size=3, readouts={"ar-trust": "causal"}, eos_ids=(), max_positions=512,
        suppress=[MASK],
    )
    prompts = [[(7 * number + 3 * place) % 300 for place in range(1 + 2 * number)] for number in range(8)]
    texts: list[list[list[int]]] = []
    drafts = [{"mode": "ar-trust", "drafts": drafts} for drafts in ("branches", "single")]
    ways: list[Any] = [{"mode": "causal"}, *drafts]
    for options in ways:
        texts.append([made.token_ids for made in engine.generate(prompts, SETTINGS, **options)])
        for number in (0, 3, 6):
            alone = engine.generate(prompts[number : number + 1], SETTINGS[number : number + 1], **options)[0]
            assert alone.token_ids == texts[-1][number], (options, number)
    assert texts[0] == texts[1] == texts[2]
    seeded = [replace(one, seed=one.seed + 1) for one in SETTINGS]
    other = [made.token_ids for made in engine.generate(prompts, seeded, mode="causal")]
    assert [a == b for a, b in zip(other, texts[0], strict=True)] == [False] * 7 + [True], "greedy needs no seed"


@pytest.mark.parametrize("options", [
    {"temperature": 0.3}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 9, "top_p": 0.8},
], ids=str)
def test_twenty_thousand_seeds_of_one_row_follow_its_softmax(options: dict[str, Any]) -> None:
    """Seeds 0, 1, 2, ... as people give them, at one position: Pearson's statistic within 4 of its deviations.

    Tokens that are expected fewer than five times count together.
    """
    draws, vocabulary = 20_000, 16
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)) * 1.2
    law = oracles.law(logits.tolist(), GenerationOptions(**options), [2])
    rows = SamplingRows.build([GenerationOptions(**options, seed=seed) for seed in range(draws)])
    token, _ = choose(logits.expand(draws, vocabulary), rows, torch.full((draws,), 17), [2])
    counts = np.bincount(token.numpy(), minlength=vocabulary)
    assert {*np.flatnonzero(counts).tolist()} <= {*law}
    cells = {token: token if draws * chance >= 5 else -1 for token, chance in law.items()}
    found, expected = dict.fromkeys(cells.values(), 0.0), dict.fromkeys(cells.values(), 0.0)
    for token_id, cell in cells.items():
        found[cell] += counts[token_id]
        expected[cell] += draws * law[token_id]
    statistic = sum((found[cell] - expected[cell]) ** 2 / expected[cell] for cell in found)
    freedom = len(found) - 1
    assert freedom > 2 and abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)
