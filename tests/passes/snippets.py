"""Programs behind single passes, and the lines of a graph that a pass's docstring talks about."""

from __future__ import annotations

import random

import torch
from torch import Tensor, fx

from flarec.ir.pipeline import run_pipeline
from flarec.ir.program import Program, target_name
from flarec.layout import Layout
from flarec.passes import pipeline
from flarec.passes.properties import CHECKS
from flarec.verify.inputs import random_layout
from tests.models import captured


def before_and_after(
    name: str, family: str = "qwen3_5_text", target: str = "decode", **options: object
) -> tuple[Program, Program]:
    """The program before and behind the pass `name` of a pipeline; `options` go to `pipeline`."""
    steps = pipeline(target, **options)  # type: ignore[arg-type]
    index = [step.name for step in steps].index(name)
    before = run_pipeline(captured(family), steps[:index], CHECKS)
    return before, run_pipeline(before, steps[index : index + 1], CHECKS)


def operands(node: fx.Node) -> dict[str, object]:
    """Operands of a mixer by name, with nodes as their names."""
    assert node.args == (), "mixers have named operands only"
    return {name: value.name if isinstance(value, fx.Node) else value for name, value in node.kwargs.items()}


def count(program: Program, name: str) -> int:
    return sum(target_name(node) == name for node in program.graph.nodes if node.op == "call_function")


def plain(program: Program, ids: Tensor) -> Tensor:
    """Logits [rows, L, V] of a program that still has `position_ids`."""
    positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    with torch.no_grad():
        return program(ids, position_ids=positions)


def example(seed: int = 0, rows: int = 2) -> tuple[Tensor, Layout]:
    """Token ids [rows, T] and a random layout with two views and both readouts."""
    layout = random_layout(random.Random(seed), rows=rows, readouts=("block_end", "causal"))
    ids = torch.randint(0, 300, (layout.rows, layout.length), generator=torch.Generator().manual_seed(seed))
    return ids, layout


def on_layout(program: Program, ids: Tensor, layout: Layout, rows: Tensor | None = None) -> Tensor:
    """Logits of a program that reads a layout (`rows` where it has `narrow-head`)."""
    with torch.no_grad():
        return program(ids, layout=layout, head_rows=rows)
