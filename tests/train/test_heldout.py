"""Held-out measurements: the loss against the source model itself, and that training what is measured raises it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from flarec.ir.program import Program
from flarec.passes import lower
from flarec.train.data.document import Document
from flarec.train.heldout import STEPS, HeldOut, prompt_of
from tests.models import END_ID
from tests.train.small_run import Small, recipe, small, source


def held_out(run: Small, *overrides: str, name: str = "draft") -> HeldOut:
    data = source()
    return HeldOut(
        [data.document(index) for index in range(len(data))],
        run.program,
        lower(run.captured, "decode", mask_vector=run.mask.kind == "vector"),
        recipe(name, "evaluation.max_new_tokens=12", *overrides),
        run.mask,
        [END_ID],
        1024,
    )


@pytest.mark.parametrize(("choice", "name"), [("auto", "draft"), ("vector", "flare")])
def test_ar_loss_is_that_of_the_model(choice: str, name: str) -> None:
    """Computed from the Hugging Face model, without its mask token's column."""
    run = small("qwen3_5_text", choice)
    run.trainer(recipe())
    measured = held_out(run, name=name)
    losses = []
    for document in measured.documents:
        ids = torch.from_numpy(document.ids)
        with torch.no_grad():
            logits = run.model(ids[None], use_cache=False).logits[0].double()
        if choice == "auto":
            logits[:, run.mask.token_id] = float("-inf")
        (start, end), = document.responses
        losses += [-torch.log_softmax(logits[at - 1], 0)[ids[at]].item() for at in range(start, end)]
    assert measured.measure()["ar_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_training_on_the_measured_documents_raises_every_measurement() -> None:
    """Four random documents are memorised. Decoding also drafts at anchors off the training grid, where a model that
    only memorises fails, so tokens per forward stay below block_size + 1."""
    run = small("qwen3_5_text")
    trainer = run.trainer(recipe("draft"))
    measured = held_out(run)
    before = measured.measure()
    for _ in range(40):
        trainer.advance()
    after = measured.measure()
    assert before["tokens_per_forward"] < 1.2 < 1.6 < after["tokens_per_forward"] <= 4.0
    assert after["ar_loss"] < 0.2 * before["ar_loss"]
    for name in ("all_masked_accuracy", "one_minus_tv"):
        assert len(before[name]) == len(after[name]) == 3
        assert all(late > early for early, late in zip(before[name], after[name], strict=True)), name
    assert min(after["all_masked_accuracy"]) > 0.8


def test_measuring_changes_nothing() -> None:
    run, chosen = small("qwen3_5_text"), recipe("dual")
    plain = run.trainer(chosen)
    expected = [plain.advance().losses.tolist() for _ in range(3)]
    trainer, measured = run.trainer(chosen), held_out(run, name="dual")
    got = []
    for _ in range(3):
        measured.measure()
        got.append(trainer.advance().losses.tolist())
    assert got == expected


def test_prompt_is_what_comes_before_the_first_response() -> None:
    ids = np.arange(10, 20)
    assert prompt_of(Document(ids, ((3, 5), (7, 10)))) == [10, 11, 12]
    assert prompt_of(Document(ids, ((1, 10),))) == [10, 11, 12, 13, 14]  # plain text: its first half
    assert prompt_of(Document(ids[:2], ((1, 2),))) == [10]


def test_whether_drafts_pay_is_said_of_the_programs_that_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal steps are those of the program that decodes causally; the sentence has what was measured."""
    measured = held_out(small("qwen3_5_text"))
    other, calls = lower(small("qwen3_5_text").captured, "decode"), []
    step = type(other).step

    def counted(program: Program, *args: Any) -> torch.Tensor:
        calls.append(program)
        return step(program, *args)

    monkeypatch.setattr(type(other), "step", counted)
    text = dataclasses.replace(measured, causal=lambda: other).pays(1.25)
    assert text is not None and "a step of AR-Trust takes" in text and "AR-Trust is" in text
    prompts = len(STEPS)  # a prefill each gives the first token
    assert sum(program is other for program in calls) == sum(STEPS) - len(STEPS) + prompts
    assert {id(program) for program in calls} == {id(other), id(measured.decode)}
    calls.clear()
    assert measured.pays(1.25) is not None and {id(program) for program in calls} == {id(measured.decode)}
    assert dataclasses.replace(measured, context=len(prompt_of(measured.documents[0])) + 1).pays(1.25) is None
