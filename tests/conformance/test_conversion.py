"""From conversion to text: training, checkpoint, plain transformers, and the three decode modes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flarec.api import load
from flarec.decode import Engine
from flarec.frontend.families import FAMILIES
from flarec.ir.program import Program
from flarec.layout import Layout, build_layout
from flarec.passes import lower
from flarec.verify.inputs import all_logits
from flarec.verify.replay import Replay, compare_caches
from flarec.verify.subject import Comparison
from tests.models import VOCABULARY

from .shared import AGAIN, BLOCK_SIZE, COVERING, EVERY, converted, eager, model, opened, stock, subject

PROMPTS = [[40, 51, 62, 73, 84, 95], [7, 8, 9], [200, 3, 150, 64, 32, 16, 8, 4, 120]]


def test_the_covering_families_have_every_mixer() -> None:
    table = {name: row for name, row in FAMILIES.items() if name not in AGAIN and name in {param.id for param in EVERY}}
    mixers = {mixer for row in table.values() for mixer in row.mixers}
    assert mixers == {mixer for name in table.keys() & {param.id for param in COVERING} for mixer in table[name].mixers}


@pytest.mark.parametrize("family", COVERING)
def test_ten_steps_lower_both_losses(family: str) -> None:
    steps = converted(family).steps
    assert [step["step"] for step in steps] == list(range(1, 11))
    for name in ("ar_loss", "diffusion_loss"):
        assert steps[-1][name] < 0.75 * steps[0][name], [step[name] for step in steps]
    assert all(math.isfinite(step["gradient_norm"]) and step["gradient_norm"] > 0 for step in steps)


@pytest.mark.parametrize("family", COVERING)
def test_the_checkpoint_opens_in_transformers_with_the_same_logits(family: str) -> None:
    """The witness is the trained program, as it still is in memory."""
    made, comparison = converted(family), Comparison()
    for tokens in PROMPTS:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            trained = all_logits(made.run.trainer.program, ids, build_layout([[len(tokens)]], [[]]))
            comparison.add(stock(family)(ids).logits, trained)
    result = comparison.result(6, "trained program = reloaded model", "logits")
    assert result.passed, result
    reloaded, before = stock(family).state_dict(), model(family).state_dict()
    assert reloaded.keys() == before.keys()
    still = [name for name, _ in model(family).named_parameters() if torch.equal(reloaded[name], before[name])]
    assert not still, "every parameter learns"
    assert all(bool(torch.isfinite(value).all()) for value in reloaded.values())


@pytest.mark.parametrize("family", COVERING)
def test_greedy_decoding_is_that_of_transformers(family: str) -> None:
    ours = opened(family)
    outputs = {
        mode: [output.token_ids for output in ours.generate_ids(PROMPTS, mode=mode, max_new_tokens=16)]
        for mode in ("causal", "ar-trust")
    }
    assert outputs["ar-trust"] == outputs["causal"]
    for prompt, tokens in zip(PROMPTS, outputs["causal"], strict=True):
        expected = stock(family).generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
        assert expected[0, len(prompt) :].tolist() == tokens


class Watched:
    """A decode program that remembers the cache as its last step found it, and counts steps that denoise alone."""

    def __init__(self, program: Program) -> None:
        self.program, self.denoised = program, 0
        self.cache: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def step(self, ids: Tensor, layout: Layout, rows: Tensor, cache: Any) -> Tensor:
        self.cache, self.denoised = copy.deepcopy(cache), self.denoised + (layout.clean_length == 0)
        return self.program.step(ids, layout, rows, cache)


@pytest.mark.parametrize("family", COVERING)
def test_diffusion_trust_fills_what_was_asked_for_and_leaves_a_clean_state(family: str) -> None:
    """Denoising steps read the caches and write none: in the end they are those of a prefill of the same tokens."""
    few = replace(subject(family, float64=True), suppress=tuple(range(300, VOCABULARY)))
    watched = Watched(few.decode)
    engine = Engine(
        watched,
        mask_token_id=few.mask_token_id,
        block_size=BLOCK_SIZE,
        readouts={"diffusion-trust": "block_end"},
        eos_ids=(),
        max_positions=512,
        suppress=few.suppress,
    )
    comparison, new = Comparison(), 3 * BLOCK_SIZE + 1
    for prompt in PROMPTS:
        (generation,) = engine.generate([prompt], mode="diffusion-trust", max_new_tokens=new)
        assert len(generation.token_ids) == new and generation.stop_reason == "length"
        assert all(token < 300 for token in generation.token_ids)
        tokens = [*prompt, *generation.token_ids]
        decoded, prefilled = Replay(few, [tokens]), Replay(few, [tokens])
        decoded.cache, decoded.fed = watched.cache, watched.cache.length.tolist()
        assert len(prompt) + 2 * BLOCK_SIZE <= decoded.fed[0] < len(tokens)
        prefilled.feed(decoded.fed)
        decoded.flush()
        prefilled.flush()
        compare_caches(comparison, decoded, prefilled)
    assert watched.denoised > len(PROMPTS)
    result = comparison.result(3, "state after denoising = prefill", "caches")
    assert result.passed and result.bound < 1e-8, result


@pytest.mark.parametrize("family", COVERING)
def test_in_bfloat16_it_is_as_close_as_transformers_is(family: str) -> None:
    """As it is deployed on a GPU. The median over tokens: where two experts nearly tie, one token may change much."""
    path = converted(family).path
    ours, theirs = load(path, dtype="bfloat16"), eager(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16))
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    train = lower(ours.program, "train")
    assert ours.program.dtype == torch.bfloat16
    for tokens in PROMPTS:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            exact = stock(family)(ids).logits[0]
            clean = build_layout([[len(tokens)]], [[]])
            rounded = {"ours": all_logits(train, ids, clean)[0], "theirs": theirs(ids).logits[0]}
        for name, logits in rounded.items():
            errors[name] += (logits.float() - exact).abs().amax(1).tolist()
    assert 0 < median(errors["ours"]) < 2 * median(errors["theirs"])
    for mode in ("causal", "ar-trust", "diffusion-trust"):
        assert all(output.new_tokens for output in ours.generate_ids(PROMPTS, mode=mode, max_new_tokens=7))
