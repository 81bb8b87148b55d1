"""Linear layers over frozen weights that are held as codes (`flarec.ops.quantized`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from flarec.errors import PropertyError
from flarec.ir.module import bind
from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program, layer_of, locate
from flarec.ops.quantized import QuantizedWeight, quantized_linear

from .adapt_noisy_stream import canonical, linear_modules, routers

LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class QuantizeBase(Pass):
    """Linear layers read the codes of their weights, where the program has them (`Program.quantized`).

    before   %y = linear(%x, %weight, %bias)
    after    %y = quantized_linear(%x, %bias, %weight_codes, %weight_scale, ..., out)

    Stands behind `lower-mixers` in every program that is lowered from a captured one whose weights are codes (`lower`);
    how a run holds its frozen model is in no checkpoint's pipeline.
    """

    name: ClassVar[str] = "quantize-base"
    requires: ClassVar[Claims] = frozenset({"lowered"})
    provides: ClassVar[Claims] = frozenset({"base-quantized"})

    def apply(self, program: Program) -> list[fx.Node]:
        made, gone = [], set()
        for node in program.calls(LINEAR):
            name = str(node.args[1].target) if isinstance(node.args[1], fx.Node) else ""
            if name in program.quantized:
                made.append(_replace(program, node, name, program.quantized[name]))
                gone.add(name)
        program.graph.eliminate_dead_code()
        left = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
        for name in gone - left:  # its value is not there any more
            owner, _, leaf = name.rpartition(".")
            del program.module.get_submodule(owner)._parameters[leaf]
        return made


def _replace(program: Program, node: fx.Node, name: str, held: QuantizedWeight) -> fx.Node:
    graph, bias = program.graph, node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    with graph.inserting_before(node):
        parts = {}
        for part, value in held.parts.items():
            bind(program.module, f"{name}_{part}", value)
            parts[part] = graph.get_attr(f"{name}_{part}")
        operands = [parts.get(part) for part in ("codes", "scale", "nested", "offset")]
        new = graph.call_function(quantized_linear, (node.args[0], bias, *operands, held.shape[0]))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def check_base_quantized(program: Program) -> None:
    """No node reads a weight that is held as codes, and codes are read as they are held."""
    read = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
    for name in sorted(program.quantized.keys() & read.keys()):
        raise PropertyError(f"{locate(next(iter(read[name].users)))} reads '{name}', which is held as codes")
    for name, held in program.quantized.items():
        for part, value in held.parts.items():
            place = f"{name}_{part}"
            if place in read and program.module.get_buffer(place) is not value:
                raise PropertyError(f"'{place}' is not what is held")


def quantizable(program: Program) -> dict[str, nn.Parameter]:
    """The weights of a captured program that can be held as codes, by their first names: matrices that linear layers
    of decoder layers read and nothing else does. Routers are none, and so are weights that the head shares."""
    program = canonical(program)
    modules, choosing = linear_modules(program), routers(program)
    first = {id(value): name for name, value in reversed(names_of_parameters(program))}
    wanted, barred = set[str](), set[str]()
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        name = first.get(id(_value(program.module, str(node.target))), "")
        own = [user for user in node.users if _is_weight_of(node, user) and user in modules and user not in choosing]
        wanted.add(name)
        if len(own) < len(node.users) or any(layer_of(user) is None for user in own):
            barred.add(name)
    return {name: program.module.get_parameter(name) for name in sorted(wanted - barred - {""})}


def _is_weight_of(node: fx.Node, user: fx.Node) -> bool:
    """Whether a node is what a linear layer multiplies by, and nothing else of it."""
    return len(user.args) > 1 and user.args[1] is node and user.all_input_nodes.count(node) == 1 and (
        node not in (user.args[0], *user.args[2:])
    )


def names_of_parameters(program: Program) -> list[tuple[str, nn.Parameter]]:
    """Every name of every parameter."""
    return list(program.module.named_parameters(remove_duplicate=False))


def _value(module: nn.Module, name: str) -> object:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)
