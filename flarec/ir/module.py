"""The module of a graph: the tensors that the graph reads, and Python code for it once somebody calls it."""

from __future__ import annotations

import contextlib

from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module


def graph_module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module with the graph and those tensors of `root` that it reads; both stay shared.

    Captured graphs and their copies are rewritten and mostly never called, and writing out and compiling a graph costs
    as much as several passes: it is put off until a call, or `compile_now`.
    """
    return _LazyGraphModule(root, graph)


def bind(root: nn.Module, name: str, value: Tensor | nn.Module) -> None:
    """Give `root` a tensor or module under a dotted name; what the name runs through is made where it is missing."""
    *path, last = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(value, nn.Module):
        owner.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        owner.register_parameter(last, value)
    else:
        owner.register_buffer(last, value)


def compile_now(module: fx.GraphModule) -> None:
    """Write out and compile the graph as it is now."""
    module.recompile()
    _LazyGraphModule.force_recompile(module)


def modules_compiled_late() -> contextlib.AbstractContextManager[None]:
    """Within the context torch's own passes, too, make modules whose code is not written before a call."""
    return _use_lazy_graph_module(True)
