"""Activation checkpointing: what a decoder layer computes is kept for its inputs alone, and computed again on the way
back. How a training program is run, not what it is: its graph, its pipeline and its results stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UsageError
from ..ir.compiled import Codes
from ..ir.effects import behind, is_write, memory_of, written
from ..ir.outline import UnitOf, outline
from ..ir.program import Program, layer_of, locate
from ..ir.regions import mark
from ..passes.split_streams import operands_with_gradient


def recomputed(program: Program, codes: Codes | None = None) -> Program:
    """The program with its decoder layers under `torch.utils.checkpoint`; parameters stay shared. codes: compiles the
    regions (`flarec.ir.regions`) of each layer and those outside of the layers.

    program: lowered for training, its parameters with the `requires_grad` of the run. Results and gradients are bit for
    bit those of `program`, where its kernels give the same bits twice: the same operations run in the same order.

    Of a layer its inputs are kept: the hidden rows before it. With `split-streams` these are the hidden rows of both
    streams, and what is computed again is what noisy rows depend on: of the clean stream the way to the mixer (norm,
    projections, states), not what follows it. A forward pass without autograd runs once, as always.
    """
    copy = program.clone()
    copy.run = rerun(copy.module, units_of(copy).get, codes)
    return copy


def rerun(module: fx.GraphModule, unit_of: UnitOf, codes: Codes | None) -> fx.GraphModule:
    """The module with its units computed again in the backward pass."""
    found = outline(module, unit_of)
    for name, unit in list(found.named_children()):
        if isinstance(unit, fx.GraphModule):
            setattr(found, name, Recomputed(unit if codes is None else compiled(unit, codes)))
    return found if codes is None else compiled(found, codes)


def compiled(module: fx.GraphModule, codes: Codes) -> fx.GraphModule:
    """The module by regions of its own: those of the whole graph reach over the ends of layers."""
    mark(module.graph)
    return codes.by_region(module)


class Recomputed(nn.Module):
    """A unit of a graph whose intermediate values are computed again in the backward pass."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit
        self.look: Callable[[nn.Module, tuple[Any, ...]], None] | None = None
        """Called with the unit and its values before it runs (`flarec.train.memory.watched`)."""

    def forward(self, *values: Any) -> tuple[Any, ...]:
        """The results of the unit, of values in the order of its placeholders."""
        if self.look is not None:
            self.look(self.unit, values)
        # nothing in a graph draws random numbers: capture is of a model in eval mode
        results: tuple[Any, ...] = checkpoint(self.unit, *values, use_reentrant=False, preserve_rng_state=False)
        return results


def units_of(program: Program) -> dict[fx.Node, str]:
    """The nodes that are computed again, each with the unit of its decoder layer, "layer_3".

    Of a layer these are the nodes that have a gradient, and those of the layer that such a node is computed from.
    Raises `UsageError` for a layer that changes what another part of the graph made: it cannot run twice.
    """
    wanted, waits = learning(program), behind(program.graph.nodes)
    for node in reversed(program.graph.nodes):
        if node in wanted:
            sources = (*node.all_input_nodes, *waits.get(node, ()))
            wanted |= {s for s in sources if s.op == "call_function" and layer_of(s) == layer_of(node)}
    layers = ((node, layer_of(node)) for node in program.graph.nodes if node in wanted and node.op != "get_attr")
    units = {node: f"layer_{layer}" for node, layer in layers if layer is not None}
    memory = memory_of(program.graph.nodes)
    for node, unit in units.items():
        if any(units.get(memory[place]) != unit for place in written(node)):
            raise UsageError(
                f"train.memory = recompute cannot be used with this model: {locate(node)} changes in place what "
                "another layer made; set train.memory=keep"
            )
    return units


def learning(program: Program) -> set[fx.Node]:
    """Nodes computed from a parameter that takes a gradient, up to where the graph stops it."""
    found: set[fx.Node] = set()
    waits = behind(program.graph.nodes)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            if _value(program.module, str(node.target)).requires_grad:
                found.add(node)
        elif node.op == "call_function":
            changed = [other for other in waits.get(node, ()) if is_write(other)]
            if any(source in found for source in (*operands_with_gradient(node), *changed)):
                found.add(node)
    return found


def _value(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(path), leaf)
    return value
