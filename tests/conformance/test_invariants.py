"""The invariants of docs/semantics.md section 5 on every family.

Where another form of our own program is the witness, both run in float64: what is left of a difference there is an
error. Against transformers, and where it is the tokens that count, float32 runs, as it is deployed.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from flarec import ops
from flarec.frontend.export import capture
from flarec.passes import lower
from flarec.passes.embed_mask import PARAMETER
from flarec.verify import INVARIANTS, Subject, ar_trust_is_causal, clean_logits, split_is_whole
from flarec.verify.inputs import all_logits, random_ids, random_layout
from tests.models import VOCABULARY, captured, tiny_model

from .shared import BLOCK_SIZE, COVERING, EVERY, MASK_ID, eager, model, subject

CASES = {1: 4, 2: 2, 3: 2, 5: 2, 6: 2, 7: 1}
IN_FLOAT64 = (2, 3, 5, 7)


@pytest.mark.parametrize("invariant", CASES)
@pytest.mark.parametrize("family", EVERY)
def test_invariant(family: str, invariant: int) -> None:
    float64 = invariant in IN_FLOAT64
    result = INVARIANTS[invariant](subject(family, float64=float64), cases=CASES[invariant])
    assert result.passed, result
    assert result.bound < (1e-8 if float64 else 1e-2), "the bound says something about these logits"


@pytest.mark.parametrize("family", COVERING)
def test_ar_trust_is_causal(family: str) -> None:
    """Only few ids may be generated, so that the drafts of a model that was never trained are accepted now and then."""
    few = replace(subject(family), suppress=tuple(range(4, VOCABULARY)))
    result = ar_trust_is_causal(few, cases=8, new_tokens=12)
    assert result.passed, result
    per_forward = float(result.compared.split(", ")[1].split()[0])
    assert 1.1 < per_forward < 3.8, "drafts must be accepted and rejected"


@pytest.mark.parametrize("family", EVERY)
def test_a_mask_vector_does_what_a_spare_row_does(family: str) -> None:
    program = captured(family).clone()
    row = model(family).get_input_embeddings().weight[MASK_ID]
    program.extra[PARAMETER] = nn.Parameter(row.detach().clone())
    lowered = lower(program, "train", mask_vector=True, debug=True)
    rng = random.Random(0)
    layout = random_layout(rng, readouts=("block_end", "causal"))
    ids = random_ids(rng, subject(family), layout)
    expected = all_logits(subject(family).train, ids, layout)
    found = all_logits(lowered, ids.masked_fill(ids == MASK_ID, VOCABULARY), layout)
    torch.testing.assert_close(found, expected)
    noisy = found[:, layout.clean_length :].square().sum()
    (gradient,) = torch.autograd.grad(noisy, program.extra[PARAMETER])
    assert bool(torch.isfinite(gradient).all()) and bool((gradient != 0).any())


WINDOWS = {"mistral": "sliding_window", "gemma2": "sliding_window", "gemma3_text": "sliding_window",
           "recurrent_gemma": "attention_window_size"}


@pytest.mark.parametrize("family", [param for param in COVERING if param.id in WINDOWS])
def test_a_window_that_is_shorter_than_the_documents(family: str) -> None:
    source = eager(tiny_model(family, **{WINDOWS[family]: 3}))
    captured = capture(source)
    assert any(node.kwargs["window"] == 3 for node in captured.calls(ops.SOFTMAX_ATTENTION.op))
    train, decode = (lower(captured, target, debug=True) for target in ("train", "decode"))
    narrow = Subject(train, decode, source, MASK_ID, block_size=BLOCK_SIZE, suppress=(MASK_ID,))
    for check in (clean_logits, split_is_whole):
        result = check(narrow, cases=3)
        assert result.passed, result
    assert ar_trust_is_causal(narrow, cases=3, new_tokens=8).passed
