"""A machine whose speed is known: a clock that moves with the operations that torch runs, and with nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten


class Machine(TorchDispatchMode):
    """Within the context each operation runs as always, and `clock()` moves on by what it takes on this machine.

    call       seconds that every operation takes, one of nothing too
    flops      floating point operations per second of matrix products, attention and triangular solves
    bandwidth  bytes per second of tensors read and written; arithmetic and traffic overlap
    gather     the same of rows that are fetched by index

    seconds, operations: how long it ran, and how much.
    """

    def __init__(self, call: float, flops: float, bandwidth: float, gather: float) -> None:
        super().__init__()
        self.call, self.flops, self.bandwidth, self.gather = call, flops, bandwidth, gather
        self.seconds = 0.0
        self.operations = 0

    def clock(self) -> float:
        return self.seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.seconds += self.call
        self.operations += 1
        if func.is_view or func is ATEN._unsafe_view.default:
            return result
        if any(word in func.__name__ for word in ("index", "embedding", "gather", "scatter")):
            self.seconds += 2 * sum(tensor.nbytes for tensor in made) / self.gather
            return result
        traffic = sum(tensor.nbytes for tensor in (*tensors, *made)) / self.bandwidth
        self.seconds += max(traffic, arithmetic(func, tensors) / self.flops)
        return result


def arithmetic(func: Any, tensors: list[Tensor]) -> int:
    """Floating point operations of the products of matrices that an operation does."""
    name = func.__name__.partition(".")[0]
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        left, right = tensors[-2:]
        return 2 * left.numel() * right.shape[-1]
    if name == "linalg_solve_triangular":
        left, right = tensors
        return left.shape[-1] * right.numel()
    if name.startswith("_scaled_dot_product"):
        backward = "backward" in name
        query, key, value = tensors[backward : 3 + backward]
        products = 2 * math.prod(query.shape[:3]) * key.shape[2] * (query.shape[3] + value.shape[3])
        return products * 5 // 2 if backward else products
    return 0
