"""What shares a row, a batch or a prompt's chunks changes nothing: exactly, on every route of the kernels.

The default suite takes three families and one with a window; `make test-exact` takes all of them, and Triton.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from flarec.decode import Engine
from flarec.ir.program import Program
from flarec.layout import Block, Layout, build_layout
from flarec.ops import mixer_of
from flarec.passes import lower
from flarec.verify.inputs import all_logits
from tests.models import ALL_FAMILIES, FAMILIES, PLAIN_FAMILIES, VOCABULARY, captured, shared_model

MASK = 400
EVERY = (*ALL_FAMILIES, *PLAIN_FAMILIES)
FIRST, SECOND = 40, 44  # a chunk of 64 tokens holds the end of the one and the beginning of the other
LAYOUT = build_layout(
    [[FIRST, SECOND]],
    [[*(Block(0, a, 3) for a in (5, 37)), *(Block(1, a, 3, 0, "causal") for a in (0, 2, 20, 41)), Block(1, 41, 3, 1)]],
).validate()


@functools.cache
def lowered(family: str, target: str, kernels: str = "torch") -> Program:
    return lower(captured(family), target, kernels=kernels)


def asked(config: pytest.Config) -> bool:
    return config.getoption("--exact-cases") is not None


def ids_of(layout: Layout, seed: int) -> Tensor:
    ids = torch.randint(MASK, (1, layout.length), generator=torch.Generator().manual_seed(seed))
    ids[:, layout.clean_length :: 2] = MASK
    return ids


def second(layout: Layout) -> Tensor:
    """The slots of the second document, its noisy tokens included."""
    owner = layout.block_document[0][layout.noisy_block[0].clamp(min=0)]
    noisy = (owner == 1) & (layout.noisy_block[0] >= 0)
    return torch.cat([layout.clean_document[0] == 1, noisy])


def test_a_document_knows_nothing_of_the_one_before_it(pytestconfig: pytest.Config) -> None:
    """One token of the first document changes, the first, one in the middle or the last: not a bit of the second does.

    Where experts are chosen per token, their product holds the rows that chose them, and sums in another order when
    there is one more: there, the last digits.
    """
    families = EVERY if asked(pytestconfig) else (*FAMILIES, "recurrent_gemma")
    routes = ("torch", "reference", "triton") if asked(pytestconfig) else ("torch",)
    own, ids = second(LAYOUT), ids_of(LAYOUT, 1)
    for family in families:
        ops = {mixer_of(node.target) for node in captured(family).graph.nodes}
        experts = any(op is not None and op.name == "moe_experts" for op in ops)
        for kernels in routes:
            program = lowered(family, "train", kernels)
            with torch.no_grad():
                before = all_logits(program, ids, LAYOUT)[0]
                for place in (0, 17, FIRST - 1):
                    changed = ids.clone()
                    changed[0, place] = (changed[0, place] + 1) % MASK
                    after = all_logits(program, changed, LAYOUT)[0]
                    assert not torch.equal(after[~own], before[~own]), (family, kernels, place)
                    moved = float((after[own] - before[own]).abs().max())
                    assert moved <= (1e-5 if experts else 0.0), (family, kernels, place, moved)


def test_prompts_in_chunks_alone_and_together(pytestconfig: pytest.Config) -> None:
    """Prompts of two lengths, fed whole or in two chunks, alone or as a batch of two: what transformers generates for
    each of them alone."""
    prompts = [[(5 * place + 3) % 300 for place in range(9)], [(7 * place + 11) % 300 for place in range(6)]]
    for family in EVERY if asked(pytestconfig) else FAMILIES:
        engine = Engine(
            lowered(family, "decode"), mask_token_id=MASK, block_size=3, readouts={"ar-trust": "causal"}, eos_ids=(),
            max_positions=VOCABULARY, suppress=[MASK],
        )
        model: Any = shared_model(family)
        expected = []
        for prompt in prompts:
            made = model.generate(
                torch.tensor([prompt]), max_new_tokens=6, do_sample=False, suppress_tokens=[MASK], eos_token_id=None,
                pad_token_id=0, attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            )
            expected.append(made[0, len(prompt) :].tolist())
        for chunk in (512, 5):
            engine._serving = engine._scheduler(2, chunk)
            together = engine.generate(prompts, mode="causal", max_new_tokens=6)
            alone = [engine.generate([prompt], mode="causal", max_new_tokens=6)[0] for prompt in prompts]
            for found in (together, alone):
                assert [made.token_ids for made in found] == expected, (family, chunk)
