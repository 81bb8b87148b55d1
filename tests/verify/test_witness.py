"""The bounds of `flarec verify` come from the model's own float32, and a fault is still one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random

import torch

from flarec.frontend.export import capture
from flarec.passes import lower
from flarec.verify import Subject, clean_logits, split_is_whole
from flarec.verify.subject import ROUNDING_STEPS
from flarec.verify.texts import Texts
from flarec.verify.witness import Witness
from tests.models import VOCABULARY, captured_float64, shared_model, tiny_model, tiny_tokenizer

TEXT = [1, 5, 9, 200, 30, 7, 8, 11]
LARGE = 3e4


def test_the_witness_is_exact() -> None:
    """As a program captured in float64, whose every cast is widened. The family has no rotary positions."""
    seen = Witness(shared_model("kimi_linear")).see(TEXT)
    program = captured_float64("kimi_linear")
    with torch.no_grad():
        theirs = program.module(torch.tensor([TEXT]), torch.arange(len(TEXT))[None])[0][0]
    torch.testing.assert_close(seen.exact, theirs, rtol=1e-12, atol=1e-12)
    assert 1e-8 < float(seen.own.max()) <= seen.error < 1e-4


@functools.cache
def cancelling() -> Subject:
    """A model whose first layer adds large numbers to the hidden states and takes them away again, as real ones do: its
    float32 is far off in what is left."""
    model = tiny_model("llama")
    direction = LARGE * torch.randn(64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.bias += direction
        model.model.layers[0].mlp.down_proj.bias -= direction
    program = capture(model, cache=True)
    train, decode = (lower(program, target) for target in ("train", "decode"))
    return Subject(train, decode, copy.deepcopy(model), mask_token_id=400, block_size=3, suppress=(400,))


def test_a_model_whose_own_float32_is_far_off_passes() -> None:
    subject = cancelling()
    result = clean_logits(subject, cases=2)
    without = ROUNDING_STEPS * torch.finfo(torch.float32).eps * subject.witness.see(TEXT).largest
    assert result.passed and result.difference > without, "rounding alone would not explain it"
    assert result.bound > without
    assert split_is_whole(subject, cases=1).passed


def test_a_wrong_weight_is_found_beside_it() -> None:
    """The failure says which text and row, and how far both ways to compute are from float64."""
    healthy = cancelling()
    program = healthy.train.clone()
    weight = program.module.get_parameter("model.layers.1.mlp.up_proj.weight")
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[:4] *= 1.5
        result = clean_logits(dataclasses.replace(healthy, train=program), cases=2)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert not result.passed
    (note,) = result.notes
    assert note.startswith("text of the ids [") and ", row " in note
    assert "flarec is " in note and "transformers' own float32 is " in note and note.endswith(" from float64")


def test_float64_programs_get_no_allowance() -> None:
    subject = cancelling()
    assert subject.slack(TEXT) > 2
    program = dataclasses.replace(subject.train, dtype=torch.float64)
    assert dataclasses.replace(subject, train=program).slack(TEXT) == 1


def test_texts_are_those_of_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    texts = Texts.of(tokenizer, VOCABULARY)
    assert texts is not None
    piece = texts.piece(random.Random(0), 30)
    assert len(piece) == 30 and tokenizer.decode(piece).strip() in tokenizer.decode(texts.tokens * 2)
    begun = dataclasses.replace(texts, start=(1, 2)).piece(random.Random(0), 5)
    assert begun[:2] == [1, 2] and len(begun) == 5
    assert Texts.of(tokenizer, 100) is None, "ids that the model does not have"
