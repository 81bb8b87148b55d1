"""Selective scans (jamba) and gated recurrences (recurrent_gemma) through the passes: operands, slots, kernels."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from flarec import ops
from flarec.decode import Cache
from flarec.ir.program import Program, placeholder_name
from flarec.layout import build_layout
from flarec.ops.gated_recurrence import RowScan
from flarec.ops.selective_scan import Scan
from flarec.passes import lower
from tests.models import captured, captured_float64, shared_model
from tests.passes.snippets import before_and_after, example, on_layout, operands

CASES: dict[str, tuple[ops.Mixer, tuple[str, ...], Any]] = {
    "jamba": (ops.SELECTIVE_SCAN, ("pending_x", "pending_dt", "pending_b"), Scan()),
    "recurrent_gemma": (ops.GATED_RECURRENCE, ("pending_x", "pending_a"), RowScan()),
}
families = pytest.mark.parametrize("family", CASES)


@families
def test_schedule_states_gives_the_layout(family: str) -> None:
    mixer, *_ = CASES[family]
    before, after = before_and_after("schedule-states", family)
    was, now = before.calls(mixer.op), after.calls(mixer.call("reference"))
    assert was and not after.calls(mixer.op)
    for old, new in zip(was, now, strict=True):
        assert operands(new) == operands(old) | {"layout": "layout"}


@families
def test_the_references_give_the_source_model_on_every_document(family: str) -> None:
    _, after = before_and_after("schedule-states", family)
    ids, layout = example(seed=4)
    logits = on_layout(after, ids, layout)
    for row in range(layout.rows):
        documents = layout.clean_document[row]
        for document in documents[documents >= 0].unique():
            slots = (documents == document).nonzero().squeeze(1)
            with torch.no_grad():
                expected = shared_model(family)(ids[row, slots][None]).logits[0]
            assert torch.allclose(logits[row, slots], expected, atol=1e-4)


@families
def test_thread_cache_adds_a_state_and_pending_rows(family: str) -> None:
    mixer, rows, _ = CASES[family]
    before, after = before_and_after("thread-cache", family)
    was, now = before.calls(mixer.call("reference")), after.calls(mixer.call("reference", step=True))
    slots = {slot.name: slot for slot in after.cache_slots}
    for old, new in zip(was, now, strict=True):
        found = operands(new)
        state = next(s for s in slots.values() if placeholder_name(s.name) == found["state"])
        names = [state.name.replace(".state", f".{kind}") for kind in ("state", *rows)]
        assert state.name.split(".")[2] == mixer.name
        added = {kind: placeholder_name(n) for kind, n in zip(("state", *rows), names, strict=True)}
        assert found == operands(old) | added | {"accepted": "accepted"}
        assert {user.args[1] for user in new.users if user.target is operator.getitem} == set(range(1 + len(names)))
        assert set(names) <= set(after.outputs)
        sizes = operand_sizes(old)
        assert slots[names[0]].shape == ("batch", *sizes[0])
        assert [slots[n].shape for n in names[1:]] == [("batch", "pending", size) for size in sizes[1]]
        assert all(slots[n].dtype == torch.float32 for n in names)


def operand_sizes(node: Any) -> tuple[tuple[int, ...], list[int]]:
    """(state, pending rows) by the op's own operands."""
    shapes = {name: x.meta["val"].shape for name, x in node.kwargs.items() if hasattr(x, "meta") and "val" in x.meta}
    if "dt" in shapes:
        return tuple(shapes["a"]), [shapes["x"][2], shapes["dt"][2], shapes["b"][2]]
    return (shapes["x"][2],), [shapes["x"][2], shapes["a"][2]]


@families
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_lower_mixers_calls_the_torch_form(family: str, kernels: str) -> None:
    """There is no Triton form: `--kernels triton` keeps these mixers with torch, and the names say so."""
    if kernels == "triton":
        pytest.importorskip("triton")
    mixer, _, derivation = CASES[family]
    for target, step in (("train", False), ("decode", True)):
        before, after = before_and_after("lower-mixers", family, target, kernels=kernels)
        was, now = before.calls(mixer.call("reference", step)), after.calls(mixer.call("torch", step))
        assert was
        for old, new in zip(was, now, strict=True):
            expected = operands(old) | {"schedule": derivation.name}
            if not step:
                del expected["layout"]
            assert operands(new) == expected
        assert after.derivations[derivation.name] == derivation


@families
def test_lowered_equals_reference_with_gradients(family: str) -> None:
    """float64: logits of all tokens and gradients of all parameters."""
    ids, layout = example(1, rows=1)
    rows = torch.arange(layout.length)
    real = (layout.token_document()[0] >= 0).nonzero().squeeze(1)
    results = []
    for kernels in ("torch", "reference"):
        program = lower(captured_float64(family), "train", kernels=kernels)
        logits = program(ids, layout=layout, head_rows=rows)[real]
        weight = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = torch.autograd.grad((logits * weight).sum(), list(program.module.parameters()), allow_unused=True)
        results.append((logits, found))
    (logits, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    assert sum(g is not None for g in gradients) > 10
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def decoded(program: Program, ids: torch.Tensor, accept: list[tuple[int, int]]) -> torch.Tensor:
    """Logits [2, L, V] of accepted rows: steps of (accepted, rejected) rows, the rejected ones other tokens."""
    cache = Cache.allocate(program.cache_slots, 2, 32, "cpu")
    parts, done = [], 0
    for keep, drafts in accept:
        size = keep + drafts
        tokens = torch.cat([ids[:, done : done + keep], (ids[:, done : done + 1] + 7).expand(-1, drafts) % 290], dim=1)
        layout = build_layout([[size]] * 2, [[], []], cached=[done] * 2)
        logits = program.step(tokens, layout, torch.arange(2 * size), cache).unflatten(0, (2, size))
        parts.append(logits[:, :keep])
        cache.accept(torch.full((2,), keep))
        done += keep
    return torch.cat(parts, dim=1)


@families
@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_steps_with_rejected_drafts_are_one_pass_of_the_source_model(family: str, kernels: str) -> None:
    ids = torch.randint(0, 290, (2, 12), generator=torch.Generator().manual_seed(3))
    program = lower(captured(family), "decode", kernels=kernels)
    logits = decoded(program, ids, [(5, 0), (1, 3), (2, 2), (1, 0), (3, 1)])
    with torch.no_grad():
        expected = shared_model(family)(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
