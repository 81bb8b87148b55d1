"""Low-rank adapters that act on noisy rows alone: the clean stream stays the source model, bit for bit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from flarec import ops
from flarec.errors import PassError, PropertyError, UsageError
from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program, layer_of, locate
from flarec.ir.spec import LENGTH, ROWS
from flarec.layout import Layout
from flarec.ops.streams import add_to_noisy, join_rows, join_streams

from .canonicalize import STOPS, Canonicalize

ATEN = torch.ops.aten
ALL = "all-linear"
WEIGHT = ".weight"
PARTS = ("lora_A.weight", "lora_B.weight")
"""Of an adapter, behind its module's name: what peft calls them."""
SUFFIX = re.compile(r"\w[\w.]*")
PRODUCTS = (ATEN.matmul.default, ATEN.mm.default, ATEN.bmm.default, ATEN.linear.default)
VIEWS = (ATEN.reshape.default, ATEN.unsqueeze.default)


@dataclass(frozen=True)
class NoisyRows:
    """[rows, T, 1] bool: whether a token is noisy. What a token knows of itself, so any node may read it."""

    name: ClassVar[str] = "noisy_rows"
    relative: ClassVar[bool] = True

    def build(self, layout: Layout, capacity: int | None) -> Tensor:
        slots = torch.arange(layout.length, device=layout.device)
        return (slots >= layout.clean_length).expand(layout.rows, -1).unsqueeze(-1)

    def describe(self) -> str:
        return "which rows are noisy"


@dataclass(frozen=True)
class AdaptNoisyStream(Pass):
    """Add `alpha / rank * B A x` to targeted linear layers, on noisy rows alone (docs/semantics.md section 6).

    before   %y = linear(%x [rows, T, in], %weight)
    after    %noisy_rows = derived from layout [rows, T, 1]
             %z = linear(linear(%x, %weight.lora_A), %weight.lora_B)
             %w = where(%noisy_rows, add(%y, %z, alpha=alpha / rank), %y)

    modules: "all-linear", module names or their ends joined by "+" ("q_proj+v_proj"), or a regular expression that
    matches whole module names. A target is a linear layer with a weight of its own inside a decoder layer; routers,
    the head and embeddings never are. Layers that share a weight share its adapter. `Program.extra` holds the
    parameters, `MODULE.lora_A.weight` [rank, in] and `MODULE.lora_B.weight` [out, rank]; those that are not there are
    made (`new_adapter`, seed 0).
    """

    rank: int = 64
    alpha: float = 64.0
    modules: str = ALL

    name: ClassVar[str] = "adapt-noisy-stream"
    requires: ClassVar[Claims] = frozenset({"two-stream"})
    provides: ClassVar[Claims] = frozenset({"noisy-adapted"})

    def text(self) -> str:
        """With every option: the text of a checkpoint must mean the same under other defaults."""
        return f"{self.name}({', '.join(f'{item.name}={getattr(self, item.name)!r}' for item in fields(self))})"

    def apply(self, program: Program) -> list[fx.Node]:
        found, made = adapted(program, self), new_adapter(program, self)
        for name, parameter in made.items():
            given = program.extra.setdefault(name, parameter)
            if given.shape != parameter.shape:
                raise PassError(
                    f"pass '{self.name}': the adapter's '{name}' is {list(given.shape)}, and this program takes "
                    f"{list(parameter.shape)}; give the adapter that was trained for this model, rank and modules"
                )
        if found:
            program.derivations[NoisyRows.name] = NoisyRows()
        return [self._adapt(program, node, module) for node, module in found]

    def _adapt(self, program: Program, node: fx.Node, module: str) -> fx.Node:
        graph, x = program.graph, node.args[0]
        names = [f"{module}.{part}" for part in PARTS]
        for name in names:
            register(program.module, name, program.extra[name])
        with graph.inserting_after(node):
            end = graph.call_function(ATEN.where.self, (None, None, node))
        with graph.inserting_before(end):
            down, up = (graph.get_attr(name) for name in names)
            low = graph.call_function(ATEN.linear.default, (x, down))
            high = graph.call_function(ATEN.linear.default, (low, up))
            both = graph.call_function(ATEN.add.Tensor, (node, high), {"alpha": self.alpha / self.rank})
            rows = self._rows(program, node)
        node.replace_all_uses_with(end, lambda user: user not in (end, both))
        end.args = (rows, both, node)
        for new in (low, high, both, end):
            new.meta = {key: value for key, value in node.meta.items() if key != "val"}
        return end

    def _rows(self, program: Program, node: fx.Node) -> fx.Node:
        """`noisy_rows` in the form of a linear layer's output."""
        rows, shape = program.placeholder(NoisyRows.name), node.meta["val"].shape
        call = program.graph.call_function
        if len(shape) == 2 and shape[0] == f"{LENGTH}*{ROWS}":
            return call(ATEN.reshape.default, (rows, [-1, 1]))
        if not (ROWS in shape and LENGTH in shape[shape.index(ROWS) : -1]):
            raise self.fail(
                node, f"gives {list(shape)}, which is neither [rows, tokens, features] nor [rows * tokens, features]",
                "leave it out of the adapter's modules",
            )
        first, second = shape.index(ROWS), shape.index(LENGTH)
        places = [1] * (second - first - 1) + [0] * first + [-1] * (len(shape) - second - 2)
        for place in places:
            rows = call(ATEN.unsqueeze.default, (rows, place))
        return rows


def adapted(program: Program, adapter: AdaptNoisyStream) -> list[tuple[fx.Node, str]]:
    """(linear layer, name of the module whose parameter is its weight), in graph order, of a canonical program.

    Raises `PassError` for options that mean nothing.
    """
    if adapter.rank < 1 or not math.isfinite(adapter.alpha):
        raise PassError(f"pass '{adapter.name}': rank {adapter.rank}, alpha {adapter.alpha}; take a rank of at least 1")
    wanted, modules, choosing, learning = (
        _matcher(adapter.modules), linear_modules(program), routers(program), _learning(program)
    )
    return [
        (node, module) for node, module in modules.items()
        if wanted(module) and layer_of(node) is not None and node not in choosing and node in learning
    ]


def remarks(program: Program, adapter: AdaptNoisyStream) -> list[str]:
    """What is named inside decoder layers and no adapter can act on, and what shares one: a sentence each."""
    program, wanted = canonical(program), _matcher(adapter.modules)
    modules, learning = linear_modules(program), _learning(program)
    stopped = {module for node, module in modules.items() if node not in learning and layer_of(node) is not None}
    products = {
        name.removesuffix(WEIGHT) for node, name in _first_names(program).items()
        if name.endswith(WEIGHT) and len(node.meta["val"].shape) == 2
        and any(layer_of(user) is not None and user.target in PRODUCTS for user in node.users)
    }
    reasons = (
        (stopped, "the model computes with its result without a gradient, so it cannot learn"),
        (products - {*modules.values()}, "the model multiplies by its weight itself instead of calling it"),
    )
    sentences = [
        f"{name} has no adapter: {reason}"
        for found, reason in reasons
        for name in sorted({module.rpartition(".")[2] for module in found if wanted(module)})
    ]
    if adapter.modules == ALL and any(mixer is ops.MOE_EXPERTS for _, mixer in ops.sites(program.graph)):
        sentences.append("the experts have no adapter: their weights are one tensor for all, not linear layers")
    sites = [module for _, module in adapted(program, adapter)]
    if shared := len(sites) - len({*sites}):
        sentences.append(
            f"layers that share their weights share an adapter, too ({shared} linear layers have none alone)"
        )
    return sentences


def new_adapter(program: Program, adapter: AdaptNoisyStream, seed: int = 0) -> dict[str, nn.Parameter]:
    """A fresh adapter for a captured program: A as peft starts it (uniform, 1 / sqrt(in)), B zero.

    Equal for an equal seed, whatever else is random. Put it into `Program.extra` of the captured program, and all
    that is lowered from it shares it.
    """
    program = canonical(program)
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, nn.Parameter] = {}
    for node, module in adapted(program, adapter):
        down, up = (f"{module}.{part}" for part in PARTS)
        if down in made:
            continue
        weight = program.module.get_parameter(str(node.args[1].target))  # type: ignore[union-attr]
        out, into = weight.shape
        start = torch.empty(adapter.rank, into)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        made[down] = nn.Parameter(start.to(weight.device, weight.dtype))
        made[up] = nn.Parameter(weight.new_zeros(out, adapter.rank))
    return made


def adapter_parameters(program: Program) -> dict[str, nn.Parameter]:
    """The adapter that a program holds, by `MODULE.lora_A.weight` and `MODULE.lora_B.weight`; empty without one."""
    return {name: parameter for name, parameter in program.extra.items() if name.endswith(PARTS)}


def canonical(program: Program) -> Program:
    """The program, or a canonical clone of one that is as it was captured: sites are looked for in canonical graphs."""
    if "canonical" in program.properties:
        return program
    program = program.clone()
    Canonicalize().apply(program)
    return program


def check_noisy_adapted(program: Program) -> None:
    """Adapters are used, and no value of a clean row is computed from one: what is leads into the noisy side of a
    choice by `noisy_rows`, and nowhere else. (That clean rows read no noisy row holds for every program: `Watch`.)"""
    adapter = adapter_parameters(program)
    reached: set[fx.Node] = set()
    used: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target in adapter:
            used.add(str(node.target))
            reached.add(node)
            continue
        sources = [source for source in node.all_input_nodes if source in reached]
        if not sources:
            continue
        if node.op == "output":
            raise PropertyError(f"{locate(sources[0])} is computed from an adapter on all rows, and is returned")
        if ops.mixer_of(node.target) is not None and ops.mixer_of(node.target).mixing != "none":  # type: ignore[union-attr]
            raise PropertyError(f"{locate(node)} reads what is computed from an adapter on all rows")
        if not _keeps_clean(program, node, reached):
            reached.add(node)
    missing = sorted(set(adapter) - used)
    if missing or not adapter:
        raise PropertyError(f"the adapter's '{missing[0]}' is not read" if missing else "there is no adapter")


def _keeps_clean(program: Program, node: fx.Node, reached: set[fx.Node]) -> bool:
    """Whether a node takes what adapters reached for noisy rows only."""
    if node.target in (join_streams, join_rows, add_to_noisy):
        return node.args[0] not in reached
    if node.target is not ATEN.where.self or len(node.args) != 3:
        return False
    rows, _, clean = node.args
    while isinstance(rows, fx.Node) and rows.target in VIEWS:
        rows = rows.args[0]
    known = type(program.derivations.get(NoisyRows.name)) is NoisyRows
    return known and rows is program.placeholder(NoisyRows.name) and clean not in reached


def _matcher(modules: str) -> Callable[[str], bool]:
    """Whether a module is meant. Raises `UsageError` for a pattern that cannot be read."""
    if modules == ALL:
        return lambda module: True
    ends = modules.split("+")
    if all(map(SUFFIX.fullmatch, ends)):
        return lambda module: any(module == end or module.endswith(f".{end}") for end in ends)
    try:
        pattern = re.compile(modules)
    except re.error as error:
        raise UsageError(
            f"the adapter's modules '{modules}' cannot be read as a regular expression ({error}); write "
            f'"{ALL}", or module names such as q_proj+v_proj'
        ) from error
    return lambda module: pattern.fullmatch(module) is not None


def linear_modules(program: Program) -> dict[fx.Node, str]:
    """For every linear layer whose weight is a parameter `MODULE.weight` as it is, the module."""
    names, found = _first_names(program), dict[fx.Node, str]()
    for node in program.calls(ATEN.linear.default):
        name = names.get(node.args[1], "")  # type: ignore[arg-type]
        if name.endswith(WEIGHT) and not name.endswith(PARTS):
            found[node] = name.removesuffix(WEIGHT)
    return found


def _first_names(program: Program) -> dict[fx.Node, str]:
    """For every node that reads a parameter the parameter's first name: layers that share it have one name."""
    named = dict(program.module.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in named.items():
        first.setdefault(id(parameter), name)
    reading = (node for node in program.graph.nodes if node.op == "get_attr" and str(node.target) in named)
    return {node: first[id(named[str(node.target)])] for node in reading}


def routers(program: Program) -> set[fx.Node]:
    """The linear layers that choose and weigh experts: the nearest ones in front of what an expert layer reads."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [
        node.kwargs[name] for node, mixer in ops.sites(program.graph) if mixer is ops.MOE_EXPERTS
        for name in ("index", "weight")
    ]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target is ATEN.linear.default:
            found.add(node)
        else:
            stack += node.all_input_nodes
    return found


def register(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give a module tree a parameter of that dotted name; modules on the way are made."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.register_parameter(last, parameter)


def _learning(program: Program) -> set[fx.Node]:
    """Nodes whose result the first output has a gradient by."""
    found: set[fx.Node] = set()
    stack = [program.output_node().args[0][0]]  # type: ignore[index]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in found or node.target in STOPS:
            continue
        found.add(node)
        stack += node.all_input_nodes
    return found
