"""What lies between mixers, in regions that run as one function each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from flarec.errors import PropertyError
from flarec.ir.outline import outline
from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program, locate
from flarec.ir.regions import MARK, READ, READS, is_plain, leaking, mark, marked

OUTLINED = "regions-outlined"


@dataclass(frozen=True)
class OutlineRegions(Pass):
    """Mark the regions between mixers (`flarec.ir.regions`); what runs the program calls each as one function.

    before   %o = lowered.linear_attention(q=%q, ...)   %y = linear(%o, %w)   %z = add(%x, %y)   %n = pow(%z, 2) ...
    after    the same nodes, those from %y to the operands of the next mixer with one number in their metadata

    Nothing that runs depends on it by itself: `flarec.ir.compiled` compiles regions, and a program without them runs as
    it is. A checkpoint's pipeline does not hold it.
    """

    name: ClassVar[str] = "outline-regions"
    requires: ClassVar[Claims] = frozenset({"lowered"})
    provides: ClassVar[Claims] = frozenset({OUTLINED})
    may_be_empty: ClassVar[bool] = True  # a graph that writes where regions would not keep the order

    def apply(self, program: Program) -> list[fx.Node]:
        if program.cache_slots:  # a decode step, which has no gradients
            for node in program.calls(*READS):
                node.meta[READ] = True
        return [region[0] for region in mark(program.graph)]


def check_outlined(program: Program) -> None:
    """Regions hold plain nodes alone, each can be called at one moment, and none writes what others read."""
    found = marked(program.graph)
    for region in found:
        for node in region:
            if not is_plain(node):
                raise PropertyError(f"{locate(node)} is in a region of plain nodes")
    writer = leaking(program.graph, found) if found else None
    if writer is not None:
        raise PropertyError(f"{locate(writer)} writes what is read outside of its region")
    try:
        outline(program.module, lambda node: f"region_{node.meta[MARK]}" if MARK in node.meta else None)
    except ValueError as error:
        raise PropertyError(str(error)) from error
