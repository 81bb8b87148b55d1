"""Experts with tokens sorted by expert: one pair of matrix products per expert that has tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import activation_function, expert


def grouped(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, *, activation: str, gated: bool = True
) -> Tensor:
    """Same arguments and result as `reference`; differentiable in x, weight, up and down."""
    activation_function(activation)
    experts, choices = up.shape[0], index.shape[1]
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)[:experts].tolist()  # the one host read: matrix sizes differ
    order = order[: sum(counts)]  # dropped choices (index == E) sort last
    token = order // choices
    inputs = x.index_select(0, token).split(counts)
    # unbind: one stacked gradient per weight, not one full-size zero-filled gradient per expert
    triples = zip(inputs, up.unbind(0), down.unbind(0), strict=True)
    results = [expert(rows, ours, back, activation, gated) for rows, ours, back in triples if rows.shape[0]]
    if not results:
        return torch.zeros_like(x)
    weighted = torch.cat(results) * weight.reshape(-1).index_select(0, order)[:, None]
    return torch.zeros_like(x).index_add(0, token, weighted.to(x.dtype))
