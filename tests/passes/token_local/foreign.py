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
from flarec.layout import Block, Layout, build_layout
from flarec.passes import pipeline
from flarec.passes.properties import CHECKERS, CHECKS
from tests.models import captured

ATEN = torch.ops.aten
FAMILIES = ("qwen3_5_text", "bamba", "lfm2")
"""Linear attention, Mamba-2, and short convolutions without a recurrence."""
Make = Callable[[fx.Graph, fx.Node], fx.Node]
"""(graph, hidden states [rows, T, D]) -> what stands for them from there on."""
UNCHECKED = Checks(dict.fromkeys(CHECKERS, lambda program: None), lambda: lambda program: None)
LENGTH = 12


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
    make: Make | list[Make],
    family: str = "qwen3_5_text",
    target: str = "train",
    behind: str = "duplicate-streams",
    checks: Checks = CHECKS,
    *,
    head: bool = False,
) -> Program:
    """The lowered program of a pipeline with the foreign pass inserted (one per `make`)."""
    foreign = [Foreign(one, head) for one in (make if isinstance(make, list) else [make])]
    rest = pipeline(target)[_index(target, behind) + 1 :]
    return run_pipeline(prefix(family, target, behind), [*foreign, *rest], checks)


def _index(target: str, name: str) -> int:
    return [step.name for step in pipeline(target)].index(name)


def moves(program: Program) -> tuple[float, float]:
    """How far logits move when one noisy block changes: (those of all other tokens, its own).

    Two rows of six clean tokens and two blocks of three; the first block of row 1 changes (slots 6 to 8).
    """
    layout = build_layout([[6], [6]], [[Block(0, 2, 3), Block(0, 3, 3)]] * 2)
    ids = torch.randint(0, 300, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[1, 6:9] = (ids[1, 6:9] + 17) % 300
    own = (ids != other).flatten()
    difference = (_logits(program, ids, layout) - _logits(program, other, layout)).abs()
    return float(difference[~own].max()), float(difference[own].max())


def _logits(program: Program, ids: Tensor, layout: Layout) -> Tensor:
    with torch.no_grad():
        return program(ids, layout=layout, head_rows=torch.arange(ids.numel()))
