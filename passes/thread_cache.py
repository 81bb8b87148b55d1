"""Decode state: every mixer reads what earlier forwards left and returns what the next one needs."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from flarec.ir.pipeline import Pass
from flarec.ir.program import Program, layer_of, placeholder_name
from flarec.ir.slots import CacheSlot
from flarec.stream_ops import (
    CACHED,
    clean_state_dtype,
    two_stream_gated_recurrence,
    two_stream_linear_attention,
    two_stream_selective_scan,
    two_stream_short_conv,
    two_stream_softmax_attention,
)


@dataclass(frozen=True)
class ThreadCache(Pass):
    """Thread KV, conv and recurrent caches through the graph; commits are deferred to the next step's `accepted` rows.

    before   %o = two_stream_linear_attention(%q, %k, %v, %g, %beta, %layout, ...)
    after    (%o, %state', %pending') = cached_linear_attention(%q, ..., %state, %pending, %accepted, %layout, ...)
             return (%logits, ..., %state', %pending')
    """

    name: ClassVar[str] = "thread-cache"
    requires: ClassVar[frozenset[str]] = frozenset({"masked", "state-scheduled", "narrowed"})
    provides: ClassVar[frozenset[str]] = frozenset({"cached"})

    def apply(self, program: Program) -> list[fx.Node]:
        threader = _Threader(program)
        return [threader.thread(node) for node in program.calls(*CACHED)]


class _Threader:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.count: Counter[str] = Counter()
        self.accepted: fx.Node | None = None

    def thread(self, node: fx.Node) -> fx.Node:
        if node.target is two_stream_softmax_attention:
            return self._attention(node)
        if node.target is two_stream_short_conv:
            return self._conv(node)
        if node.target is two_stream_selective_scan:
            return self._scan(node)
        if node.target is two_stream_gated_recurrence:
            return self._recurrence(node)
        assert node.target is two_stream_linear_attention
        return self._state(node)

    def _attention(self, node: fx.Node) -> fx.Node:
        q, k, v, *rest = node.args
        prefix = self._prefix(node, "attention")
        caches = [
            self._slot(prefix, kind, ("batch", _size(operand, 1), "capacity", _size(operand, 3)), _dtype(operand))
            for kind, operand in (("keys", k), ("values", v))
        ]
        graph = self.program.graph
        with graph.inserting_before(node):
            new = graph.call_function(_cached(node), (q, k, v, *caches, *rest))
        return self._replace(node, new, new)

    def _conv(self, node: fx.Node) -> fx.Node:
        x, weight, bias, *rest = node.args
        prefix = self._prefix(node, "conv")
        width = _size(weight, 1)
        buffer = self._slot(prefix, "conv", ("batch", _size(x, 1), width - 1), _dtype(x))
        graph = self.program.graph
        with graph.inserting_before(node):
            new = graph.call_function(_cached(node), (x, weight, bias, buffer, self._accepted(), *rest))
        return self._with_outputs(node, new, [f"{prefix}.conv"])

    def _state(self, node: fx.Node) -> fx.Node:
        q, k, v, g, beta, *rest = node.args
        prefix = self._prefix(node, "linear")
        heads, keys, values = _size(v, 2), _size(k, 3), _size(v, 3)
        dtype = clean_state_dtype(_dtype(v))
        shapes: dict[str, tuple[int | str, ...]] = {
            "state": ("batch", heads, keys, values),
            "pending_k": ("batch", "pending", _size(k, 2), keys),
            "pending_d": ("batch", "pending", heads, values),
        }
        if g is not None:
            channel = len(g.meta["val"].shape) == 4  # type: ignore[union-attr]
            shapes["pending_g"] = ("batch", "pending", heads, keys) if channel else ("batch", "pending", heads)
        slots = {kind: self._slot(prefix, kind, shape, dtype) for kind, shape in shapes.items()}
        graph = self.program.graph
        with graph.inserting_before(node):
            cached = (slots["state"], slots["pending_k"], slots["pending_d"], slots.get("pending_g"))
            new = graph.call_function(_cached(node), (q, k, v, g, beta, *cached, self._accepted(), *rest))
        return self._with_outputs(node, new, [f"{prefix}.{kind}" for kind in shapes])

    def _scan(self, node: fx.Node) -> fx.Node:
        x, _, a, *_ = node.args
        channels, states = _size(a, 0), _size(a, 1)
        rows = {"pending_x": channels, "pending_dt": channels, "pending_b": states}
        return self._diagonal(node, "scan", (channels, states), rows, _dtype(x))

    def _recurrence(self, node: fx.Node) -> fx.Node:
        channels = _size(node.args[0], 2)
        rows = {"pending_x": channels, "pending_a": channels}
        return self._diagonal(node, "recurrence", (channels,), rows, _dtype(node.args[0]))

    def _diagonal(
        self, node: fx.Node, kind: str, state: tuple[int, ...], rows: dict[str, int], dtype: torch.dtype
    ) -> fx.Node:
        """A recurrence whose operands end with the layout: its state and pending rows come before it."""
        prefix = self._prefix(node, kind)
        shapes: dict[str, tuple[int | str, ...]] = {"state": ("batch", *state)}
        shapes |= {name: ("batch", "pending", size) for name, size in rows.items()}
        slots = [self._slot(prefix, name, shape, clean_state_dtype(dtype)) for name, shape in shapes.items()]
        *operands, layout = node.args
        graph = self.program.graph
        with graph.inserting_before(node):
            new = graph.call_function(_cached(node), (*operands, *slots, self._accepted(), layout))
        return self._with_outputs(node, new, [f"{prefix}.{name}" for name in shapes])

    def _accepted(self) -> fx.Node:
        if self.accepted is None:
            self.accepted = self.program.placeholder("accepted")
        return self.accepted

    def _prefix(self, node: fx.Node, kind: str) -> str:
        """`layers.3.linear`, numbered if a layer has several mixers of one kind."""
        base = f"layers.{layer_of(node)}.{kind}"
        self.count[base] += 1
        return base if self.count[base] == 1 else f"{base}{self.count[base]}"

    def _slot(self, prefix: str, kind: str, shape: tuple[int | str, ...], dtype: torch.dtype) -> fx.Node:
        name = f"{prefix}.{kind}"
        self.program.cache_slots += (CacheSlot(name, kind, shape, dtype),)
        return self.program.placeholder(placeholder_name(name))

    def _with_outputs(self, node: fx.Node, new: fx.Node, names: list[str]) -> fx.Node:
        graph = self.program.graph
        with graph.inserting_before(node):
            parts = [graph.call_function(operator.getitem, (new, i)) for i in range(1 + len(names))]
        self.program.add_outputs(zip(names, parts[1:], strict=True))
        return self._replace(node, new, parts[0])

    def _replace(self, node: fx.Node, new: fx.Node, value: fx.Node) -> fx.Node:
        new.meta = dict(node.meta)
        value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
        self.program.graph.erase_node(node)
        return new


def _cached(node: fx.Node) -> Callable[..., Any]:
    return CACHED[node.target]


def _size(operand: Any, dim: int) -> int:
    return int(operand.meta["val"].size(dim))


def _dtype(operand: Any) -> torch.dtype:
    dtype: torch.dtype = operand.meta["val"].dtype
    return dtype
