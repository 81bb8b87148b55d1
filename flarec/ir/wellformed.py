"""What every captured graph holds, and every canonical one: checked on the graph alone."""

from __future__ import annotations

import torch

from ..errors import PropertyError
from .program import Program, locate

ATEN = torch.ops.aten


def check_captured(program: Program) -> None:
    """One output (the logits first, or what the head makes them of), only calls of known kinds, parameters that exist.
    """
    first = "logits" if program.head is None else "hidden"
    if not program.outputs or program.outputs[0] != first:
        raise PropertyError(f"the first output is not '{first}'")
    results = program.output_node().args[0]
    if not isinstance(results, tuple) or len(results) != len(program.outputs):
        raise PropertyError(f"the graph returns other things than its outputs {program.outputs}")
    for node in program.graph.nodes:
        if node.op in ("call_module", "call_method"):
            raise PropertyError(f"{locate(node)} calls into a module; a program holds functions only")
        if node.op == "get_attr" and not _attribute_exists(program, str(node.target)):
            raise PropertyError(f"{locate(node)} reads '{node.target}', which the program does not have")


def _attribute_exists(program: Program, target: str) -> bool:
    owner: object = program.module
    for part in target.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def check_canonical(program: Program) -> None:
    """No guards, no device constants, no wrapped regions, no dead pure nodes."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target)
        if "_assert" in name or "sym_constrain" in name:
            raise PropertyError(f"{locate(node)} is a guard")
        if getattr(node.target, "__name__", "").startswith("wrap_with_"):
            raise PropertyError(f"{locate(node)} is a region that was not inlined")
        if node.target is ATEN.to.device or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise PropertyError(f"{locate(node)} fixes a device or hides a subgraph")
        if not node.users and not node.is_impure():
            raise PropertyError(f"{locate(node)} is dead")
