"""narrow-adapter: the same adapters, for noisy rows alone; clean rows keep every bit."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, fx

from flarec.decode.cache import Cache
from flarec.errors import PropertyError
from flarec.ir.program import Program
from flarec.layout import READOUTS, Block, Layout, build_layout
from flarec.ops.streams import add_to_noisy, noisy_stream
from flarec.passes import lower, pipeline
from flarec.passes.adapt_noisy_stream import adapter_parameters
from flarec.passes.narrow_adapter import check_adapter_narrowed, wide_adapters
from flarec.passes.split_streams import StreamPositions
from tests.passes.test_adapt_noisy_stream import ADAPTER, DENSE, clean_slots, every_row, source

ATEN = torch.ops.aten


@functools.cache
def both(family: str) -> tuple[Program, Program]:
    steps = [pipeline("decode", adapter=ADAPTER, narrow=narrow) for narrow in (False, True)]
    wide, narrow = (lower(source(family), "decode", steps=given, debug=True) for given in steps)
    return wide, narrow


def logits(program: Program, ids: Tensor, layout: Layout) -> Tensor:
    cache = Cache.allocate(program.cache_slots, layout.rows, 64, "cpu")
    return program.step(ids, layout, every_row(layout), cache)


def example(blocks: list[Block]) -> tuple[Tensor, Layout]:
    layout = build_layout([[5], [5]], [blocks, blocks])
    return torch.randint(0, 300, (2, layout.length), generator=torch.Generator().manual_seed(3)), layout


def test_before_and_after_of_the_docstring() -> None:
    wide, program = both("qwen3_5_text")
    assert len(wide_adapters(wide)) * 2 == len(adapter_parameters(wide)) and not wide_adapters(program)
    ends = program.calls(add_to_noisy)
    assert len(ends) == len(wide_adapters(wide)) > 20
    positions = program.placeholder("noisy_position_ids")
    assert program.derivations["noisy_position_ids"] == StreamPositions("noisy")
    copies = set()
    for end in ends:
        y, high, given, alpha = end.args
        assert isinstance(y, fx.Node) and isinstance(high, fx.Node) and isinstance(high.args[0], fx.Node)
        assert given is positions and alpha == 1.5 and {*y.users} == {end}
        copy = high.args[0].args[0]
        assert isinstance(copy, fx.Node) and copy.target is ATEN.contiguous.default
        assert copy.args[0].target is noisy_stream and copy.args[0].args == (y.args[0], positions, 1)  # type: ignore[union-attr]
        copies.add(copy)
    assert len(copies) == len({end.args[0].args[0] for end in ends})  # type: ignore[union-attr]
    assert "noisy_rows" not in program.derivations, "nothing is chosen any more"


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("readout", READOUTS)
def test_a_step_computes_the_same(family: str, readout: str) -> None:
    """Clean rows hold the same bits; noisy ones differ by the rounding of products of fewer rows."""
    ids, layout = example([Block(0, 3, 3, readout=readout), Block(0, 5, 3, readout=readout)])
    expected, found = (logits(program, ids, layout) for program in both(family))
    clean = clean_slots(layout)
    assert torch.equal(expected[clean], found[clean])
    torch.testing.assert_close(found[~clean], expected[~clean], rtol=0, atol=2e-5)


def test_a_step_without_noisy_rows() -> None:
    ids, layout = example([])
    expected, found = (logits(program, ids, layout) for program in both("qwen3_5_text"))
    assert torch.equal(expected, found)


def test_what_others_read_is_not_written() -> None:
    program = both("bamba")[1].clone()
    end = program.calls(add_to_noisy)[0]
    y = end.args[0]
    with program.graph.inserting_before(end):
        program.graph.call_function(ATEN.neg.default, (y,))
    with pytest.raises(PropertyError, match="writes into what others read"):
        check_adapter_narrowed(program)
    with pytest.raises(PropertyError, match="computed for both streams"):
        check_adapter_narrowed(both("bamba")[0])
