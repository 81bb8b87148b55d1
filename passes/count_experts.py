"""How evenly experts are used, counted while training: a further output of the graph for every expert layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from flarec import ops
from flarec.errors import PropertyError
from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program, layer_of, locate
from flarec.layout import Layout
from flarec.ops.streams import join_rows

OUTPUT = "experts."
"""Prefix of the outputs: `experts.LAYER`, numbered (`experts.LAYER.2`) if a layer has several."""


@dataclass(frozen=True)
class TokenStreams:
    """[rows * T] int64: whether a token is clean (0), noisy (1) or padding (2)."""

    name: ClassVar[str] = "token_streams"

    def build(self, layout: Layout, capacity: int | None) -> Tensor:
        return ops.token_streams(layout)

    def describe(self) -> str:
        return "stream of every token"


@dataclass(frozen=True)
class CountExperts(Pass):
    """Count which experts clean rows and noisy rows are sent to; the results of the other nodes stay as they are.

    before   %y = flarec.moe_experts(x=%x, index=%chosen [rows * T, k], ...)              return %logits
    after    %token_streams = derived from layout
             %n = flarec.count_experts(%chosen, %token_streams, experts) [2, experts]      return %logits, %n
    """

    name: ClassVar[str] = "count-experts"
    requires: ClassVar[Claims] = frozenset({"two-stream"})
    provides: ClassVar[Claims] = frozenset({"experts-counted"})
    targets: ClassVar[frozenset[str]] = frozenset({"train"})
    may_be_empty: ClassVar[bool] = True  # a model without experts

    def apply(self, program: Program) -> list[fx.Node]:
        numbers: Counter[str] = Counter()
        made: list[tuple[str, fx.Node]] = []
        for node, mixer in ops.sites(program.graph):
            if mixer is not ops.MOE_EXPERTS:
                continue
            program.derivations[TokenStreams.name] = TokenStreams()
            streams, experts = program.placeholder(TokenStreams.name), ops.site_of(node).size("up", 0)
            with program.graph.inserting_after(node):
                counts = program.graph.call_function(ops.count_experts, (node.kwargs["index"], streams, experts))
            counts.meta = {key: value for key, value in node.meta.items() if key != "val"}
            layer = layer_of(node)
            base = f"{OUTPUT}{-1 if layer is None else layer}"
            numbers[base] += 1
            made.append((base if numbers[base] == 1 else f"{base}.{numbers[base]}", counts))
        if made:
            program.add_outputs(made)
        return [node for _, node in made]


def check_experts_counted(program: Program) -> None:
    """The choices of every expert layer are counted by stream, and every count is an output of its own."""
    returned = list(program.output_node().args[0])  # type: ignore[arg-type]
    outputs = {node for name, node in zip(program.outputs, returned, strict=True) if name.startswith(OUTPUT)}
    for node, mixer in ops.sites(program.graph):
        if mixer is not ops.MOE_EXPERTS:
            continue
        index = node.kwargs["index"]
        readers = [index, *(user for user in index.users if user.target is join_rows)]  # type: ignore[union-attr]
        counts = [user for reader in readers for user in reader.users if user.target is ops.count_experts]  # type: ignore[union-attr]
        if not any(user in outputs for user in counts):
            raise PropertyError(f"{locate(node)} chooses experts that no output counts")
        if type(program.derivations.get(TokenStreams.name)) is not TokenStreams:
            raise PropertyError("the experts are counted by streams that are not derived from the layout")
        for user in counts:
            if user.args[1] is not program.placeholder(TokenStreams.name):
                raise PropertyError(f"{locate(user)} does not count by the layout's streams")
