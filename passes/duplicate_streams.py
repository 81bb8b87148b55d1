"""From one causal stream to a clean and a noisy one in the same row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program
from flarec.layout import Layout


@dataclass(frozen=True)
class PositionIds:
    """[rows, T] int64, position of every token inside its document."""

    def build(self, layout: Layout, capacity: int | None) -> Tensor:
        return layout.position_ids()

    def describe(self) -> str:
        return "positions inside the document, clean | noisy"


@dataclass(frozen=True)
class DuplicateStreams(Pass):
    """Let a row hold Lc clean and Ln noisy tokens; positions come from the layout. Nothing between mixers changes.

    before   (input_ids [rows, L], position_ids [rows, L]) -> logits [rows, L, V]
    after    (input_ids [rows, Lc + Ln], layout) -> logits [rows, Lc + Ln, V]
             position_ids = derived from layout
    """

    name: ClassVar[str] = "duplicate-streams"
    requires: ClassVar[Claims] = frozenset({"canonical"})
    provides: ClassVar[Claims] = frozenset({"two-stream"})

    def apply(self, program: Program) -> list[fx.Node]:
        ids = program.placeholder("input_ids")
        positions = next((node for node in program.placeholders() if node.name == "position_ids"), None)
        sites = [ids]
        if positions is not None and positions.users:
            program.derivations["position_ids"] = PositionIds()
            sites.append(positions)
        elif positions is not None:
            program.graph.erase_node(positions)
        program.placeholder("layout")
        return sites
