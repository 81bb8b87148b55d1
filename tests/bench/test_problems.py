"""What the benchmark times: layouts, inputs, and the bytes and arithmetic that rates are computed from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flarec.bench import linear, softmax
from flarec.bench.problems import DecodeStep, Linear, Softmax, StreamSizes
from flarec.bench.session import Session
from flarec.kernels.softmax_attention.mask import visibility


@pytest.mark.parametrize(
    "streams",
    [
        StreamSizes(2, 40, 4),
        StreamSizes(1, 41, 3),
        StreamSizes(2, 60, 4, documents=5, prompt=0.25),
        StreamSizes(1, 40, views=0),
    ],
)
def test_layouts_are_valid_and_hold_every_response_once_per_view(streams: StreamSizes) -> None:
    layout = streams.layout("cpu").validate()
    assert (layout.rows, layout.clean_length) == (streams.rows, streams.tokens)
    assert bool((layout.clean_document >= 0).all()), "no padding"
    lengths = streams.lengths()
    assert sum(lengths) == streams.tokens and len(lengths) == streams.documents
    blocks = sum(-(-(n - int(streams.prompt * n)) // streams.block) for n in lengths)
    assert layout.noisy_length == streams.views * blocks * streams.block
    assert layout.length == streams.length
    assert streams.documents == 1 or lengths[-1] > 2 * lengths[0]


def test_small_problems_keep_the_options() -> None:
    problem = Linear(StreamSizes(8, 4096, 16, documents=10, prompt=0.25), gate="channel", delta=False)
    small = problem.small(136)
    assert (small.streams.rows, small.streams.tokens, small.streams.documents) == (1, 136, 3)
    assert replace(small, streams=problem.streams) == problem
    assert (small.streams.block, small.streams.prompt, small.streams.views) == (16, 0.25, 2)


def test_inputs_are_leaves_with_normalised_keys_and_decays_below_zero() -> None:
    problem = Linear(StreamSizes(2, 8), heads=3, key_dim=16, value_dim=8, gate="channel")
    x = problem.named(problem.inputs(24, "cpu"))
    assert x["q"].shape == x["k"].shape == x["g"].shape == (2, 24, 3, 16)
    assert x["v"].shape == (2, 24, 3, 8) and x["beta"].shape == (2, 24, 3)
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in x.values())
    assert torch.allclose(x["k"].float().norm(dim=-1), torch.ones(2, 24, 3), atol=0.01)
    assert bool((x["g"] < 0).all()) and x["g"].dtype == torch.float32
    assert problem.named(replace(problem, gate="none").inputs(8, "cpu"))["g"] is None


def test_bytes_and_arithmetic_of_the_standard_layer() -> None:
    """The floor of the design: 1.6 GB and 200 to 330 GFLOP forward, about 3 GB and twice the arithmetic backward."""
    forward, backward = linear.least_bytes(Linear())
    assert forward == 98304 * 16 * (4 * 256 + 8)
    assert 2.7e9 < backward < 3.2e9
    flops = linear.dense_flops(Linear())
    assert 2.0e11 < flops[0] < 3.3e11 and flops[1] == 2 * flops[0]


def test_pairs_are_those_of_the_mask() -> None:
    problem = Softmax(StreamSizes(2, 21, 4, documents=2, prompt=0.25))
    ratio = softmax.pairs_ratio(Session(torch.device("cpu")), problem)
    mask = visibility(problem.streams.layout("cpu"), window=None, cache_length=None)
    assert ratio == pytest.approx(int(mask.sum()) / (2 * 21 * 22 / 2))


def test_a_decode_step_has_a_block_after_every_clean_row() -> None:
    problem = DecodeStep(batch=3, heads=2, key_dim=16, value_dim=8)
    layout = problem.layout("cpu").validate()
    assert (layout.rows, layout.clean_length, layout.noisy_length) == (3, 4, 12)
    assert (layout.block_anchor - layout.cached[:, None]).tolist() == [[1, 2, 3, 4]] * 3
    state, k, d, g, accepted = problem.cache("cpu")
    assert state.shape == (3, 2, 16, 8) and state.dtype == torch.float32
    assert k.shape == (3, 4, 2, 16) and d.shape == (3, 4, 2, 8) and g.shape == (3, 4, 2)
    assert accepted.tolist() == [0, 1, 2]
