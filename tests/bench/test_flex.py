"""The flex baseline computes the same attention: its forward on the CPU, where flex has no backward."""

from __future__ import annotations

import pytest
import torch

from flarec.bench.flex import block_mask, flex_two_stream
from flarec.bench.problems import StreamSizes
from flarec.kernels.softmax_attention.reference import reference
from flarec.layout import Layout


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("readout", ["block_end", "causal"])
def test_equals_the_reference(readout: str, window: int | None) -> None:
    layout: Layout = StreamSizes(rows=2, tokens=40, block=3, documents=2, prompt=0.25, readout=readout).layout("cpu")
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, layout.length, 16, generator=gen) for heads in (4, 2, 2))
    expected = reference(q, k, v, layout, scale=0.3, window=window)
    got = flex_two_stream(q, k, v, layout, 0.3, block_mask(layout, window))
    real = layout.token_document() >= 0
    torch.testing.assert_close(got[real], expected[real])
