"""A step between two reports asks the device nothing: it runs on a device whose tensors have no values.

The modules of real programs are left to the `gpu` tests: Triton runs nowhere else without values. What they derive from
the layout is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from flarec.base.generation import GenerationOptions
from flarec.decode import Engine
from flarec.decode.cache import Cache
from flarec.decode.request import Request, Stopping
from flarec.decode.rows import Rows
from flarec.ir.slots import CacheSlot
from flarec.layout import Layout
from flarec.ops.linear_attention import StepTiles
from flarec.ops.short_conv import ConvOrder, ConvWindows
from flarec.ops.softmax_attention import SoftmaxMask
from tests.decode.fake_model import FakeProgram
from tests.decode.test_scheduler import WAYS

META = torch.device("meta")
VOCABULARY = 50
SAMPLING = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "suppress": [3]},
]


class ValuelessProgram:
    """Derives what the lowered programs of a GPU derive, and returns tensors without values."""

    device = META
    vocab_size = VOCABULARY
    cache_slots: Sequence[CacheSlot] = FakeProgram.cache_slots

    def __init__(self, width: int = VOCABULARY) -> None:
        self.width = width
        self.derived: dict[str, Any] = {}

    def step(self, input_ids: Tensor, layout: Layout, head_rows: Tensor, cache: Cache) -> Tensor:
        assert input_ids.shape == (layout.rows, layout.length)
        for item in (SoftmaxMask(), SoftmaxMask(8), ConvWindows(4), ConvOrder(4), StepTiles()):
            self.derived[item.describe()] = item.build(layout, cache.capacity)
        for slot in self.cache_slots:
            if not slot.in_place:
                sizes = {"batch": layout.rows, "pending": layout.clean_length}
                shape = [sizes[size] if isinstance(size, str) else size for size in slot.shape]
                shape[-1] += layout.clean_length if slot.kind == "conv" else 0
                cache.tensors[slot.name] = torch.empty(shape, dtype=slot.dtype, device=META)
        return torch.empty(len(head_rows), self.width, device=META)


@pytest.mark.parametrize("size", [1, 3, 9])
@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_step_asks_the_device_nothing(way: dict[str, Any], sampling: dict[str, Any], size: int) -> None:
    """Blocks of 9 make steps of more rows than the linear attention's tile."""
    width = VOCABULARY + (size + 1 if way["mode"] == "elastic" else 0)
    program = ValuelessProgram(width)
    engine = Engine(
        program, mask_token_id=VOCABULARY - 1, block_size=size, eos_ids=(), max_positions=1000, suppress=[49],
        readouts={"ar-trust": "causal", "diffusion-trust": "block_end"}, horizon=lambda: program,
    )
    options = engine._filled(GenerationOptions(**way, **sampling))
    requests = [Request(index, [1, 2, 3], 20, Stopping(), options) for index in range(3)]
    suppress = torch.zeros(VOCABULARY, dtype=torch.bool, device=META)
    rows = Rows(program, engine._mode(options), requests, [options] * 3, suppress)
    heads = rows.blocks.heads if rows.blocks else 0
    noisy = torch.empty(3, int(rows.blocks is not None), heads, width, device=META)
    values = rows.mode.start(rows, torch.empty(3, 1, width, device=META), noisy)
    assert values.shape[0] == 3 and values.dtype == torch.int64
    shapes = set()
    for ready in (False, True, True):
        for request in requests:
            request.ready = ready
        shape = rows.mode.shape(rows)
        shapes.add(shape)
        rows.active = torch.ones(3, dtype=torch.bool, device=META)
        values = rows.compute(shape)
        assert values.shape[0] == 3 and values.device == META
    assert len(shapes) == (1 if way["mode"] == "causal" else 2) and len(program.derived) == 5


def test_a_value_that_is_read_is_noticed() -> None:
    """The device of these tests raises where a GPU would wait."""
    value = torch.zeros(3, device=META)
    for read in (lambda: value.tolist(), lambda: bool((value > 0).any()), lambda: value.nonzero(), value.sum().item):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
