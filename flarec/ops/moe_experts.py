"""Mixture-of-experts feed-forward layers: token by token, one op because export cannot trace their routing."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..kernels.moe_experts.reference import reference
from .mixer import Form, Mixer, Site


def _captured(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool = True
) -> Tensor:
    return reference(x, index, weight, up, down, activation=activation, gated=gated)


def _fake(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str, gated: bool = True
) -> Tensor:
    return x.new_empty(x.shape)


def _options(site: Site) -> Iterator[str]:
    yield f"activation {site['activation']}"
    if not site["gated"]:
        yield "no gate"


MOE_EXPERTS = Mixer(
    name="moe_experts",
    captured=_captured,
    fake=_fake,
    mixing="none",
    axes={"x": "ND", "index": "NK", "weight": "NK"},
    output="ND",
    sees="token by token",
    options=_options,
    forms={"torch": Form(train="flarec.kernels.moe_experts.torch_grouped:grouped", opaque=("train",))},
)
"""x [N,D], index and weight [N,k], up [E,2I,D] (gated) or [E,I,D], down [E,D,I] -> [N,D]."""
