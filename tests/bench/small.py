"""A session of the benchmark that is small enough for Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from flarec.bench.problems import Conv, DecodeStep, Linear, Softmax, StreamSizes
from flarec.bench.session import Session


def shrink(problem: Any) -> Any:
    """The same kind of problem: one head, few tokens, the same blocks, views and documents. float32 where kernels are
    interpreted: there a conversion to bfloat16 truncates."""
    problem = problem if torch.cuda.is_available() else replace(problem, dtype=torch.float32)
    if isinstance(problem, DecodeStep):
        return replace(problem, batch=2, heads=1, key_dim=16, value_dim=16, cached=7)
    streams: StreamSizes = replace(problem.streams, rows=1, tokens=24, documents=min(problem.streams.documents, 2))
    if isinstance(problem, Linear):
        return replace(problem, streams=streams, heads=1, key_dim=16, value_dim=16)
    if isinstance(problem, Conv):
        return replace(problem, streams=streams, channels=16)
    assert isinstance(problem, Softmax)
    return replace(problem, streams=streams, heads=2, key_heads=1, dim=16)


def small_session() -> Session:
    """On the GPU if there is one: the sizes are as small there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Session(device, budget_ms=1, small_tokens=24, size=shrink)
