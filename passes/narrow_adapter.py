"""Adapters of a decode step compute for noisy rows alone, not for all rows with a choice behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from flarec.errors import PropertyError
from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program, locate
from flarec.ir.spec import LENGTH, NOISY, ROWS
from flarec.ops.streams import add_to_noisy, noisy_stream

from .adapt_noisy_stream import NoisyRows
from .split_streams import StreamPositions

ATEN = torch.ops.aten
LINEAR = ATEN.linear.default


@dataclass(frozen=True)
class NarrowAdapter(Pass):
    """Run the low-rank products of `adapt-noisy-stream` on noisy rows, and add them there in place.

    before   %y = linear(%x [rows, T, in], %weight)   %z = linear(linear(%x, %weight.lora_A), %weight.lora_B)
             %w = where(%noisy_rows, add(%y, %z, alpha=scale), %y)
    after    %y = linear(%x [rows, T, in], %weight)   %x_noisy = contiguous(noisy_stream(%x, %noisy_position_ids, 1))
             %z = linear(linear(%x_noisy, %weight.lora_A), %weight.lora_B)
             %w = add_to_noisy(%y, %z, %noisy_position_ids, scale)

    Clean rows hold the same bits. A layer whose rows are not [rows, T, features] stays as it is.
    """

    name: ClassVar[str] = "narrow-adapter"
    requires: ClassVar[Claims] = frozenset({"noisy-adapted"})
    provides: ClassVar[Claims] = frozenset({"adapter-narrowed"})
    targets: ClassVar[frozenset[str]] = frozenset({"decode"})
    may_be_empty: ClassVar[bool] = True  # a model that flattens its rows before every layer

    def apply(self, program: Program) -> list[fx.Node]:
        sites = wide_adapters(program)
        if not sites:
            return []
        item, graph = StreamPositions(NOISY), program.graph
        program.derivations[item.name] = item
        positions = program.placeholder(item.name)
        rows: dict[fx.Node, fx.Node] = {}
        made = []
        for end in sites:
            both, y = end.args[1], end.args[2]
            assert isinstance(both, fx.Node) and isinstance(y, fx.Node)
            high = both.args[1]
            assert isinstance(high, fx.Node) and isinstance(high.args[0], fx.Node)
            low = high.args[0]
            x = low.args[0]
            assert isinstance(x, fx.Node)
            if x not in rows:  # layers that read the same rows share a copy of the noisy ones
                with graph.inserting_before(low):
                    part = graph.call_function(noisy_stream, (x, positions, 1))
                    rows[x] = graph.call_function(ATEN.contiguous.default, (part,))
                _like(part, low)
                _like(rows[x], low)
            low.args = (rows[x], *low.args[1:])
            with graph.inserting_before(end):
                new = graph.call_function(add_to_noisy, (y, high, positions, both.kwargs.get("alpha", 1)))
            _like(new, end)
            end.replace_all_uses_with(new)
            made.append(new)
        for end in sites:
            both = end.args[1]
            assert isinstance(both, fx.Node)
            graph.erase_node(end)
            graph.erase_node(both)
        graph.eliminate_dead_code()
        for node in program.placeholders():
            if node.name == NoisyRows.name and not node.users:
                graph.erase_node(node)
                del program.derivations[node.name]
        return made


def wide_adapters(program: Program) -> list[fx.Node]:
    """The choices of adapters that are computed for all rows [rows, T, features], of which nobody else reads a part."""
    found = []
    for node in program.calls(ATEN.where.self):
        if len(node.args) != 3:
            continue
        rows, both, y = node.args
        if not (isinstance(rows, fx.Node) and rows.op == "placeholder" and rows.name == NoisyRows.name):
            continue
        if not (isinstance(both, fx.Node) and isinstance(y, fx.Node) and _is(both, ATEN.add.Tensor)):
            continue
        high = both.args[1]
        if both.args[0] is not y or not _is(high, LINEAR) or not _is(high.args[0], LINEAR):  # type: ignore[union-attr]
            continue
        low = high.args[0]  # type: ignore[union-attr]
        shape = y.meta["val"].shape
        plain = len(shape) == 3 and shape[0] == ROWS and shape[1] == LENGTH and y.target is LINEAR
        own = {*y.users} == {node, both} and {*both.users} == {node} and {*high.users} == {both}  # type: ignore[union-attr]
        if plain and own and {*low.users} == {high} and low.args[0] is y.args[0]:  # type: ignore[union-attr]
            found.append(node)
    return found


def check_adapter_narrowed(program: Program) -> None:
    """No adapter of plain rows computes for clean ones, and what is written in place nobody else reads."""
    for node in wide_adapters(program):
        raise PropertyError(f"{locate(node)} chooses between rows that were computed for both streams")
    for node in program.calls(add_to_noisy):
        y = node.args[0]
        if not _is(y, LINEAR) or {*y.users} != {node}:  # type: ignore[union-attr]
            raise PropertyError(f"{locate(node)} writes into what others read")


def _is(node: object, target: object) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _like(new: fx.Node, old: fx.Node) -> None:
    new.meta = {key: value for key, value in old.meta.items() if key != "val"}
