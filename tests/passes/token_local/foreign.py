"""A pass as somebody else would write it: it puts nodes behind a residual addition and says nothing about them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from flarec.ir.pipeline import Checks, Pass, run_pipeline
from flarec.ir.program import Program
from flarec.layout import Block, build_layout
from flarec.passes import pipeline
from flarec.passes.properties import CHECKERS, CHECKS
from tests.models import captured

ATEN = torch.ops.aten
FAMILIES = ("qwen3_5_text", "bamba", "lfm2")
"""Linear attention, Mamba-2, and short convolutions without a recurrence."""
Make = Callable[[fx.Graph, fx.Node], fx.Node]
"""(graph, hidden states [rows, T, D]) -> what stands for them from there on."""
UNCHECKED = Checks(dict.fromkeys(CHECKERS, lambda program: None), lambda: lambda program: None)
ROWS, LENGTH = 2, 9


@dataclass(frozen=True)
class Foreign(Pass):
    """Put `make` behind the first residual addition of layer 1 (`head`: behind the logits)."""

    make: Make
    head: bool = False

    name: ClassVar[str] = "foreign"

    def apply(self, program: Program) -> list[fx.Node]:
        graph = program.graph
        hidden: Any = program.output_node().args[0][0] if self.head else residual(program)  # type: ignore[index]
        users = list(hidden.users)
        with graph.inserting_before(hidden.next):
            new = self.make(graph, hidden)
        for user in users:
            user.replace_input_with(hidden, new)
        return [new]


def residual(program: Program, layer: int = 1) -> fx.Node:
    """The first residual addition of a layer."""
    for node in program.calls(ATEN.add.Tensor):
        modules = node.meta.get("modules") or (("", ""),)
        if modules[-1][0].endswith(f"layers.{layer}"):
            return node
    raise AssertionError(f"layer {layer} adds nothing")


@functools.cache
def prefix(family: str, target: str, last: str) -> Program:
    """The program behind the pass `last` of a pipeline."""
    steps = pipeline(target)
    return run_pipeline(captured(family), steps[: _index(target, last) + 1], CHECKS)


def with_foreign(
    make: Make,
    family: str = "qwen3_5_text",
    target: str = "train",
    behind: str = "duplicate-streams",
    checks: Checks = CHECKS,
    *,
    head: bool = False,
) -> Program:
    """The lowered program of a pipeline with the foreign pass inserted."""
    rest = pipeline(target)[_index(target, behind) + 1 :]
    return run_pipeline(prefix(family, target, behind), [Foreign(make, head), *rest], checks)


def _index(target: str, name: str) -> int:
    return [step.name for step in pipeline(target)].index(name)


def largest_move(program: Program) -> float:
    """How far logits move that must not, when only the noisy tokens of row 1 change.

    Two rows of six clean tokens and one block of three; compared are all tokens but that block.
    """
    layout = build_layout([[6], [6]], [[Block(0, 2, 3)], [Block(0, 3, 3)]])
    ids = torch.randint(0, 300, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[1, 6:] = (ids[1, 6:] + 17) % 300
    before, after = (_logits(program, x, layout) for x in (ids, other))
    assert not torch.equal(before[-3:], after[-3:]), "the block itself moves"
    return float((before - after)[:-3].abs().max())


def _logits(program: Program, ids: Tensor, layout: Any) -> Tensor:
    rows = torch.arange(ids.numel())
    with torch.no_grad():
        return program(ids, layout=layout, head_rows=rows).flatten(0, -2)
