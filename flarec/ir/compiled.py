"""Running a graph by its regions: each is a compiled function, and regions that compute the same share one.

Parameters are operands of these functions, so that a model needs a few of them, however many layers it has. What is
compiled is how a program is run (`Program.run`); the graph, its pipeline and its text do not depend on the compiler of
a machine. Behind it is `torch.compile`, one graph per region without breaks. A region that was compiled for one size is
compiled once more for any size when another one comes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from ..errors import FlarecWarning
from .module import compile_now, graph_module
from .outline import outline
from .program import Program, locate
from .regions import MARK

NAME = "region_{}"
Backend = str | Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
"""Of `torch.compile`."""

EXACT = 4
"""Kinds of steps that are compiled for their own sizes: of one running request or of some, in one mode or two."""


def by_rules(backend: Backend) -> dict[str, Any] | None:
    """Options of `torch.compile` with which inductor chooses the tiles of reductions by its rules.

    Otherwise it times every choice, each launched by itself, and a kernel of a decode step takes a microsecond or five:
    where a launch takes the host longer than that, all of them take as long, and the slowest may be chosen. The same
    option keeps inductor from padding matrix products and from every other choice by time that changes rounding;
    pointwise kernels are still timed.
    """
    if backend != "inductor":
        return None
    from torch import _inductor  # torch's compiler, which nothing else needs

    return {"deterministic": True} if "deterministic" in _inductor.list_options() else None


class Code:
    """What equal regions run: a graph that takes inputs and parameters, compiled when it is called first.

    The first `exact` kinds of sizes are compiled for themselves: their kernels know them. dynamic: of
    `torch.compile`, for the others; timing: of `Codes`. Where it cannot be compiled the graph is run as it is, and
    `say` is told why.
    """

    def __init__(
        self, module: fx.GraphModule, backend: Backend, say: Callable[[str], None], exact: int = 0,
        dynamic: bool | None = None, timing: bool = True,
    ) -> None:
        self.module = module
        self.backend = backend
        self.options = None if timing else by_rules(backend)
        self.say = say
        self.exact = exact
        self.compiles = True
        self.compiled = self._compile(module, dynamic)
        self.exactly: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def _compile(self, module: fx.GraphModule, dynamic: bool | None) -> Callable[..., Any]:
        compile_now(module)
        # not the module: its `__call__` looks at exceptions that pass, and dynamo makes others of them (torch 2.13)
        compiled: Callable[..., Any] = torch.compile(
            module.forward, backend=self.backend, fullgraph=True, dynamic=dynamic, options=self.options
        )
        return compiled

    def _of_sizes(self, operands: tuple[Any, ...]) -> Callable[..., Any]:
        if not self.exact:
            return self.compiled
        sizes = tuple(x.shape if isinstance(x, Tensor) else x for x in _pytree.tree_leaves(operands))
        if sizes not in self.exactly and len(self.exactly) < self.exact:
            graph = fx.Graph()
            graph.output(graph.graph_copy(self.module.graph, {}))
            # code of its own: what dynamo knows of other sizes belongs to theirs
            self.exactly[sizes] = self._compile(graph_module(nn.Module(), graph), False)
        return self.exactly.get(sizes, self.compiled)

    def __call__(self, *operands: Any) -> tuple[Tensor, ...]:
        if self.compiles:
            try:
                results: tuple[Tensor, ...] = self._of_sizes(operands)(*operands)
                return results
            except Exception as error:
                from torch._dynamo import exc  # torch's compiler, which nothing else needs

                if isinstance(error, exc.FailOnRecompileLimitHit):
                    self.say("it was compiled for too many sizes, and others run as they are")
                elif isinstance(error, exc.TorchDynamoException):
                    self.compiles = False
                    self.say(f"{_reason(error)}; it runs as it is")
                else:
                    raise
        plain: tuple[Tensor, ...] = self.module(*operands)
        return plain


class Region(nn.Module):
    """A region at its place: the code that it shares, and the parameters and buffers that are its own."""

    def __init__(self, code: Code, tensors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.code = code
        self.tensors = tensors

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        return self.code(*inputs, *self.tensors)


class Codes:
    """The distinct codes of one or more graphs, by what they compute. backend: of `torch.compile`; exact, dynamic: of
    `Code`. timing: the compiler may time kernels to choose between them; no: it follows rules, where it has some
    (`by_rules`).

    A `FlarecWarning` says what is not compiled, once for each reason.
    """

    def __init__(
        self, backend: Backend = "inductor", exact: int = 0, dynamic: bool | None = None, timing: bool = True
    ) -> None:
        self.backend = backend
        self.exact = exact
        self.dynamic = dynamic
        self.timing = timing
        self.known: dict[str, Code] = {}
        self.said: set[str] = set()

    def by_region(self, module: fx.GraphModule) -> fx.GraphModule:
        """A module with the inputs and results of `module` that calls its marked regions (`flarec.ir.regions`)."""
        found = outline(module, lambda node: NAME.format(node.meta[MARK]) if MARK in node.meta else None)
        for node in list(found.graph.nodes):
            if node.op == "call_module" and str(node.target).startswith(NAME.format("")):
                unit = found.get_submodule(str(node.target))
                assert isinstance(unit, fx.GraphModule)
                setattr(found, str(node.target), self._region(unit))
        return found

    def _region(self, unit: fx.GraphModule) -> Region:
        graph, tensors, text = lifted(unit)
        if text not in self.known:
            first = next(node for node in unit.graph.nodes if node.op == "call_function")
            say = functools.partial(self._say, locate(first))
            self.known[text] = self.code(graph_module(nn.Module(), graph), say)
        return Region(self.known[text], tensors)

    def code(self, module: fx.GraphModule, say: Callable[[str], None]) -> Code:
        """What regions like this one run."""
        return Code(module, self.backend, say, self.exact, self.dynamic, self.timing)

    def _say(self, where: str, why: str) -> None:
        if why not in self.said:
            self.said.add(why)
            warnings.warn(f"the region of {where} is not compiled: {why}", FlarecWarning, stacklevel=4)


def step_codes(exact: int = EXACT) -> Codes:
    """Code of steps, whose reductions are over sooner than their launches, by which inductor would time them."""
    return Codes(exact=exact, timing=False)


def reading_codes() -> Codes:
    """Code that reads prompts, in pieces of any size."""
    return Codes(dynamic=True)


def lifted(unit: fx.GraphModule) -> tuple[fx.Graph, tuple[Tensor, ...], str]:
    """A unit's graph with its parameters and buffers as inputs behind its own; these tensors; and what it computes as
    text, without names: equal texts are equal functions."""
    graph, values, tensors = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, Tensor]()
    text: list[str] = []
    for node in unit.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.placeholder(f"input_{len(values)}")
            text.append(f"input {node.meta.get('val')}")
    for node in unit.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in tensors:
            tensor = tensors[str(node.target)] = _tensor(unit, str(node.target))
            values[node] = graph.placeholder(f"tensor_{len(tensors)}")
            text.append(f"tensor {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}")
        elif node.op == "get_attr":
            values[node] = next(values[n] for n in values if n.op == "get_attr" and n.target == node.target)
    number = {value: index for index, value in enumerate(values.values())}
    for node in unit.graph.nodes:
        if node.op in ("call_function", "output"):
            shown = fx.node.map_arg((node.args, node.kwargs), lambda source: _Place(number[values[source]]))
            values[node] = graph.node_copy(node, lambda source: values[source])
            number[values[node]] = len(number)
            text.append(f"{node.target} {shown}")
    return graph, tuple(tensors.values()), "\n".join(text)


class _Place(int):
    """An operand in the text of a graph."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _tensor(unit: fx.GraphModule, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(unit.get_submodule(path), leaf)
    return tensor


def _reason(error: BaseException) -> str:
    """What a compiler says, in one line."""
    inner = getattr(error, "inner_exception", error)  # of a backend that raised
    lines = [line.strip() for line in str(inner).splitlines()]
    return f"{type(inner).__name__}: {next((line for line in lines if line), 'no message')}"[:300]


def compiled_by_region(program: Program, codes: Codes | None = None) -> Program:
    """This program, run by its marked regions; parameters stay shared. A pass cannot change it any more.

    It is called as this one is. Each region is compiled at its first call, and once more when sizes change. A program
    without regions is run as it is, which a `FlarecWarning` says.
    """
    if not any(MARK in node.meta for node in program.graph.nodes):
        warnings.warn("nothing of this model is compiled: its graph has no regions", FlarecWarning, stacklevel=2)
    found = program.clone()
    found.run = (codes or Codes()).by_region(found.module)
    return found
