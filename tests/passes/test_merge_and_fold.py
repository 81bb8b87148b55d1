"""merge-projections and fold-constants: the same logits, parameters under their names, buffers that follow them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from flarec.decode.cache import Cache
from flarec.errors import PropertyError
from flarec.frontend.export import capture
from flarec.ir.pipeline import check_properties
from flarec.ir.program import Program
from flarec.layout import Block, build_layout
from flarec.passes import lower, pipeline
from flarec.passes.adapt_noisy_stream import AdaptNoisyStream
from flarec.passes.fold_constants import FoldConstants, foldable
from flarec.passes.merge_projections import MergeProjections, mergeable
from flarec.passes.properties import CHECKERS
from tests.models import FAMILIES, tiny_model
from tests.passes.snippets import count


def fresh(family: str, dtype: torch.dtype = torch.float32) -> Program:
    """A capture whose parameters no other test reads: the passes move them."""
    return capture(tiny_model(family).to(dtype), cache=True)


def steps(program: Program, seed: int = 0) -> list[Tensor]:
    """Logits of a prefill and of a step with drafts and blocks behind it, and the caches."""
    generator = torch.Generator().manual_seed(seed)
    cache = Cache.allocate(program.cache_slots, 2, 64, "cpu")
    found = []
    for layout, taken in (
        (build_layout([[6], [4]], [[], []]), [6, 4]),
        (build_layout([[3], [2]], [[Block(0, 8, 2)], [Block(0, 5, 2)]], cached=[6, 4]), [2, 1]),
    ):
        ids = torch.randint(0, 300, (2, layout.length), generator=generator)
        real = (layout.token_document() >= 0).flatten()
        found.append(program.step(ids, layout, torch.arange(ids.numel()), cache)[real])
        cache.accept(torch.tensor(taken))
    return found + list(cache.tensors.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family: str) -> None:
    """In float64 to rounding, in float32 to its rounding; with fewer products, and parameters that are parts of one."""
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        program = fresh(family, dtype)
        before = {name: value.clone() for name, value in program.parameters().items()}
        plain = lower(program, "decode")
        wanted = steps(plain)
        fast = lower(program, "decode", fast=True, debug=True)
        assert {"projections-merged", "constants-folded"} <= fast.properties
        assert count(fast, "linear") < count(plain, "linear")
        for mine, other in zip(steps(fast), wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
        after = fast.parameters()
        assert set(after) == set(before) and all(torch.equal(after[name], value) for name, value in before.items())
        kept = fast.constants
        assert kept is not None and kept.merged
        for name, sources in kept.merged.items():
            whole = kept.buffers[name].untyped_storage()
            assert all(after[part].untyped_storage().data_ptr() == whole.data_ptr() for part in sources)
            assert whole.nbytes() == sum(after[part].numel() for part in sources) * dtype.itemsize
        own = set(program.module.state_dict())
        assert set(fast.module.state_dict()) <= own | {"mask"} and set(fast.clone().parameters()) == set(before)


def test_constants_are_folded_and_follow_parameters() -> None:
    """A norm's `1 + weight` is read, not computed; a parameter that changes, in place or by other memory, is seen."""
    program = fresh("qwen3_5_text")
    plain, fast = lower(program, "decode"), lower(program, "decode", fast=True)
    assert not foldable(fast) and foldable(plain) and count(fast, "add") < count(plain, "add")
    kept = fast.constants
    assert kept is not None and kept.folded is not None and kept.is_current() and not kept.refresh()
    parameters = fast.parameters()
    norm = next(name for name in parameters if name.endswith("input_layernorm.weight"))
    part = next(iter(kept.merged.values()))[1]
    for change in ("in place", "other memory"):
        with torch.no_grad():
            for name in (norm, part):
                new = torch.randn(parameters[name].shape, generator=torch.Generator().manual_seed(len(change)))
                if change == "in place":
                    parameters[name].copy_(new)
                else:
                    parameters[name].data = new
        addresses = [buffer.data_ptr() for buffer in kept.buffers.values()]
        found = steps(fast)
        for mine, other in zip(found, steps(plain), strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)
        assert kept.is_current() and addresses == [buffer.data_ptr() for buffer in kept.buffers.values()]


def test_a_wrong_buffer_and_a_layer_left_over_are_found() -> None:
    fast = lower(fresh("qwen3_5_text"), "decode", fast=True)
    checkers: dict[str, Any] = dict.fromkeys(fast.properties, lambda program: None)
    checked = checkers | {name: CHECKERS[name] for name in ("projections-merged", "constants-folded")}
    check_properties(fast, checked)
    assert fast.constants is not None
    name = fast.constants.names[0]
    fast.constants.buffers[name].add_(1)
    with pytest.raises(PropertyError, match="not what its parameters give"):
        check_properties(fast, checked)
    plain = lower(fresh("qwen3_5_text"), "decode")
    for claim, message in (("projections-merged", "reads the same rows"), ("constants-folded", "parameters alone")):
        with pytest.raises(PropertyError, match=message):
            CHECKERS[claim](plain)


def test_adapters_shared_weights_and_training_are_left_alone() -> None:
    program = fresh("qwen3_5_text")
    adapted = lower(program, "decode", adapter=AdaptNoisyStream(rank=2, alpha=2.0), fast=True)
    assert adapted.constants is not None and not adapted.constants.merged and not mergeable(adapted)
    assert {type(step) for step in pipeline("train", fast=True)}.isdisjoint({MergeProjections, FoldConstants})
    stored = "\n".join(step.text() for step in pipeline("decode", fast=True))
    assert [step.text() for step in pipeline("decode", fast=True, stored=stored)] == stored.splitlines()
    shared = copy.copy(lower(program, "decode"))
    group = mergeable(shared)[0]
    with shared.graph.inserting_after(group[0]):
        again = shared.graph.call_function(torch.ops.aten.linear.default, group[0].args)
    assert again not in mergeable(shared)[0] and group[0] not in mergeable(shared)[0]
