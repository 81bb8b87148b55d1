"""thread-cache: every mixer reads decode state and returns the next one."""

from __future__ import annotations

import operator
from collections import Counter

import pytest
import torch

from flarec import ops
from flarec.decode import Cache
from flarec.ir.program import placeholder_name
from flarec.layout import build_layout
from tests.models import FAMILIES, shared_model
from tests.passes.snippets import before_and_after, operands

EXPECTED = {
    # kind -> (count, shape)
    "qwen3_5_text": {
        "conv": (3, ("batch", 128, 3)),
        "state": (3, ("batch", 4, 16, 16)),
        "pending_k": (3, ("batch", "pending", 2, 16)),
        "pending_d": (3, ("batch", "pending", 4, 16)),
        "pending_g": (3, ("batch", "pending", 4)),
        "keys": (1, ("batch", 2, "capacity", 16)),
        "values": (1, ("batch", 2, "capacity", 16)),
    },
    "kimi_linear": {
        "conv": (2, ("batch", 192, 3)),
        "state": (2, ("batch", 4, 16, 16)),
        "pending_k": (2, ("batch", "pending", 4, 16)),
        "pending_d": (2, ("batch", "pending", 4, 16)),
        "pending_g": (2, ("batch", "pending", 4, 16)),
        "keys": (2, ("batch", 4, "capacity", 24)),
        "values": (2, ("batch", 4, "capacity", 16)),
    },
    "bamba": {
        "conv": (2, ("batch", 192, 3)),
        "state": (2, ("batch", 8, 16, 16)),
        "pending_k": (2, ("batch", "pending", 2, 16)),
        "pending_d": (2, ("batch", "pending", 8, 16)),
        "pending_g": (2, ("batch", "pending", 8)),
        "keys": (2, ("batch", 2, "capacity", 16)),
        "values": (2, ("batch", 2, "capacity", 16)),
    },
}


def _repeats_key_heads() -> bool:
    """Older transformers repeat qwen3_5 key heads before the mixer, newer ones leave them grouped."""
    import inspect

    from transformers.models.qwen3_5 import modeling_qwen3_5

    return "repeat_interleave" in inspect.getsource(modeling_qwen3_5.Qwen3_5GatedDeltaNet.forward)


@pytest.mark.parametrize("family", FAMILIES)
def test_slots(family: str) -> None:
    _, after = before_and_after("thread-cache", family)
    found = Counter((slot.kind, slot.shape) for slot in after.cache_slots)
    expected = {(kind, shape): count for kind, (count, shape) in EXPECTED[family].items()}
    if family == "qwen3_5_text" and _repeats_key_heads():
        expected[("pending_k", ("batch", "pending", 4, 16))] = expected.pop(("pending_k", ("batch", "pending", 2, 16)))
    assert found == expected
    assert {slot.dtype for slot in after.cache_slots} == {torch.float32}
    names = [slot.name for slot in after.cache_slots]
    assert len(set(names)) == len(names)
    assert all(slot.name.startswith("layers.") and slot.name.endswith(f".{slot.kind}") for slot in after.cache_slots)
    returned = {slot.name for slot in after.cache_slots if not slot.in_place}
    assert set(after.outputs) == {"logits"} | returned
    assert len(after.output_node().args[0]) == len(after.outputs)  # type: ignore[arg-type]


def test_before_and_after_of_the_docstring() -> None:
    before, after = before_and_after("thread-cache")
    olds = before.calls(ops.LINEAR_ATTENTION.call("reference"))
    news = after.calls(ops.LINEAR_ATTENTION.call("reference", step=True))
    for was, node in zip(olds, news, strict=True):
        added = {name: value for name, value in operands(node).items() if name not in operands(was)}
        assert operands(node) == operands(was) | added
        assert added.pop("accepted") == "accepted"
        assert list(added) == ["state", "pending_k", "pending_d", "pending_g"]
        assert all(str(value).endswith(f"_linear_attention_{name}") for name, value in added.items())
        parts = {user.args[1] for user in node.users if user.target is operator.getitem}
        assert parts == {0, 1, 2, 3, 4}, "output, state, pending rows"
    (attention,) = after.calls(ops.SOFTMAX_ATTENTION.call("reference", step=True))
    found = operands(attention)
    assert "accepted" not in found, "keys and values are written where they belong"
    assert [found["k_cache"], found["v_cache"]] == [
        placeholder_name("layers.3.softmax_attention.keys"),
        placeholder_name("layers.3.softmax_attention.values"),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_references_decode_like_transformers(family: str) -> None:
    """Before any lowering: five tokens, then one by one, against one pass of the source model."""
    _, after = before_and_after("thread-cache", family)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(3))
    cache = Cache.allocate(after.cache_slots, 2, 16, "cpu")
    parts = []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 9)):
        size = stop - start
        layout = build_layout([[size]] * 2, [[], []], cached=[start] * 2)
        logits = after.step(ids[:, start:stop], layout, torch.arange(2 * size), cache)
        parts.append(logits.unflatten(0, (2, size)))
        cache.accept(torch.full((2,), size))
    with torch.no_grad():
        expected = shared_model(family)(ids).logits
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-4)
