"""A piece of a prompt waits for nothing: what programs derive from it is made on the host, once per shape."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from flarec.base.generation import GenerationOptions
from flarec.decode.cache import Cache
from flarec.decode.modes.ar_trust import ARTrustMode
from flarec.decode.modes.causal import CausalMode
from flarec.decode.pieces import MOST_KEPT, PieceLayouts, PieceShape
from flarec.decode.plan import FAR
from flarec.decode.prefill import Prefill
from flarec.decode.prefix import PrefixCache
from flarec.decode.request import Request, Stopping
from flarec.decode.rows import Mode, Rows
from flarec.decode.stepper import BlockSpec, Stepper
from flarec.ir.program import Program
from flarec.layout import Layout
from flarec.passes import lower
from tests.models import FAMILIES, captured

META = torch.device("meta")
BLOCKS = BlockSpec(3, 3, "causal", 5)
NO_VALUES = (RuntimeError, NotImplementedError)


class Valueless:
    """Derives what a program derives, beside a device whose tensors have no values: one that is read raises."""

    device = META

    def __init__(self, program: Program) -> None:
        self.derivations, self.cache_slots, self.vocab_size = (
            program.derivations, program.cache_slots, program.vocab_size
        )
        self.derived: list[dict[str, Any]] = []

    def step(self, ids: Tensor, layout: Layout, head_rows: Tensor, cache: Cache) -> Tensor:
        assert ids.shape == (layout.rows, layout.length) and ids.device == META
        mine = cast(Any, self)
        self.derived.append(Program.derive(mine, layout, Program.capacity(mine, cache)))
        sizes = {"batch": layout.rows, "pending": layout.clean_length}
        for slot in self.cache_slots:
            if not slot.in_place:
                shape = [sizes[size] if isinstance(size, str) else size for size in slot.shape]
                shape[-1] += layout.clean_length if slot.kind == "conv" else 0
                cache.tensors[slot.name] = torch.empty(shape, dtype=slot.dtype, device=META)
        return torch.empty(len(head_rows), self.vocab_size, device=META)


def rows_of(program: Any, mode: Mode, lengths: list[int]) -> Rows:
    options = GenerationOptions().filled(mode="causal", drafts="branches", threshold=0.9, denoising_steps=1)
    requests = [Request(index, [1] * length, 9, Stopping(), options) for index, length in enumerate(lengths)]
    return Rows(program, mode, requests, [options] * len(requests), None)


@pytest.mark.parametrize("mode", [CausalMode(), ARTrustMode(BLOCKS)], ids=lambda mode: type(mode).__name__)
@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_piece_waits_for_nothing(family: str, kernels: str, mode: Mode) -> None:
    """All forwards of two prompts of five chunks are queued; the first tokens alone are read."""
    program = Valueless(lower(captured(family), "decode", kernels=kernels))
    rows = rows_of(program, mode, [640, 601])
    prefill = Prefill(rows, 128)
    for _ in range(4):
        assert not prefill.advance()
    with pytest.raises(NO_VALUES):
        prefill.advance()
    assert len(program.derived) == prefill.forwards == 5
    relative = {name for name, item in program.derivations.items() if getattr(item, "relative", False)}
    _, second, third, fourth, last = program.derived
    assert relative and all(second[name] is third[name] is fourth[name] for name in relative)
    assert not any(last[name] is fourth[name] for name in relative)
    tensors = [leaf for derived in program.derived for leaf in _pytree.tree_leaves(derived) if isinstance(leaf, Tensor)]
    assert tensors and all(tensor.device == META for tensor in tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_would_be_noticed(family: str) -> None:
    """Where the host does not know how much is cached schedules are made of what the device holds."""
    rows = rows_of(Valueless(lower(captured(family), "decode", kernels="triton")), CausalMode(), [128])
    plan = rows.plan([128], heads=[1])
    with pytest.raises(NO_VALUES):
        rows.run(plan, rows.clean([[1] * 128]))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_numbers_are_those_of_derivations_of_their_own(family: str) -> None:
    """Bit for bit: logits and caches, of pieces that begin a text, soon after that, and far from it."""
    program = lower(captured(family), "decode")
    texts = [list(range(3, 203)), list(range(9, 170))]
    ways = [Stepper(program, Cache.allocate(program.cache_slots, 2, 256, "cpu"), BLOCKS) for _ in range(2)]
    at = [0, 0]
    for size, anchors in ((17, []), (40, [40]), (40, []), (40, []), (24, [0, 24])):
        pieces = [text[start : start + size] for text, start in zip(texts, at, strict=True)]
        found = []
        for stepper, cached in zip(ways, (at, None), strict=True):
            counts = [len(piece) for piece in pieces]
            behind = [[min(anchor, count) for anchor in anchors] for count in counts]
            plan = stepper.plan(counts, behind)
            found.append(stepper.run(plan, torch.cat([stepper.clean(pieces), stepper.masked(plan)], 1), cached=cached))
            stepper.cache.accept(plan.counts)
        assert torch.equal(*found)
        first, second = (stepper.cache.tensors for stepper in ways)
        assert all(torch.equal(first[name], second[name]) for name in first)
        at = [start + len(piece) for start, piece in zip(at, pieces, strict=True)]
    assert min(at) > 2 * FAR


def test_little_is_kept() -> None:
    """Of prompts of every length; those that are used go on."""
    layouts, cached = PieceLayouts(torch.device("cpu")), torch.tensor([100])

    def kept(count: int) -> object:
        return layouts.of(PieceShape((count,), ((),), (count % 2,), 1, 0, "causal"), cached, [100]).kept

    whole = kept(64)
    for count in range(1, 64):
        kept(count)
        assert kept(64) is whole and len(layouts._kept) <= MOST_KEPT and len(layouts._places) <= MOST_KEPT
    shape = PieceShape((64,), ((),), (1,), 1, 0, "causal")
    near = [layouts.of(shape, torch.tensor([n]), [n]).kept for n in (0, 1, FAR)]
    assert all(a is not b for a, b in itertools.pairwise(near)) and near[2] is whole


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "bamba"])
@torch.no_grad()
def test_no_kernel_of_a_piece_waits(family: str, kept: bool) -> None:
    """CUDA says so of everything that a real program runs; the first two pieces may compile and tune. Of experts the
    host reads how many tokens each has."""
    from flarec.frontend.export import capture
    from tests.models import tiny_model

    program = lower(capture(tiny_model(family).cuda()), "decode", kernels="triton")
    prefixes = PrefixCache(1 << 30, 64) if kept else None
    prefill = Prefill(rows_of(program, ARTrustMode(BLOCKS), [640, 601]), 128, prefixes)
    prefill.advance()
    prefill.advance()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert not prefill.advance() and not prefill.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert prefill.advance()
