"""The program: a captured model as an fx graph, with its properties and the history of what passes did to it.

The graph's parameters are those of the Hugging Face model, under their names. Besides `input_ids` the graph may take
the layout, tensors derived from it once per batch (`derivations`), rows for the head, and caches (`cache_slots`);
`outputs` names what it returns. Running a program feeds all of these by name.

Metadata of a node (`node.meta`), where it is known: "val", the `TensorSpec` of its result; "modules", the (path, class
name) pairs of the modules it was made in, the outermost first; "source", `file:line` of the model code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from ..errors import UsageError
from ..layout import Layout, StepLayout
from .constants import Constants
from .head import Head
from .module import compile_now, graph_module
from .slots import CacheSlot

LAYER_LISTS = ("layers", "h")
"""What models call their list of decoder layers."""
LAYER = re.compile(rf"(?:^|\.)(?:{'|'.join(LAYER_LISTS)})\.(\d+)(?:\.|$)")


class Derivation(Protocol):
    """Something computed from the layout once per batch and shared by all layers (a mask, a schedule, ...).

    One whose sizes depend on the layout's numbers has `on_host = True`: it is made on the host and moved (`derive`).
    One with `relative = True` is the same, in what a decode step reads of it, however many tokens are cached
    (`flarec.layout.SharedDerivations`).
    """

    def build(self, layout: Layout, capacity: int | None) -> Any:
        """`capacity`: slots of the KV cache, None without a cache."""

    def describe(self) -> str: ...


@dataclass(frozen=True)
class Record:
    """What one pass did: its text with options, rewritten nodes, change of op counts, seconds; its name and options."""

    step: str
    sites: tuple[str, ...]
    delta: Mapping[str, int]
    seconds: float
    provides: tuple[str, ...]
    name: str = "capture"
    options: Mapping[str, Any] = field(default_factory=dict)


class CacheTensors(Protocol):
    """What a program needs of a decode cache (see `flarec.decode.cache`)."""

    tensors: dict[str, Tensor]
    accepted: Tensor


@dataclass
class Program:
    """An fx graph with its contract. Passes change it in place; `clone` first (parameters stay shared)."""

    module: fx.GraphModule
    config: Any
    family: str
    dtype: torch.dtype
    properties: frozenset[str] = frozenset()
    history: tuple[Record, ...] = ()
    derivations: dict[str, Derivation] = field(default_factory=dict)
    cache_slots: tuple[CacheSlot, ...] = ()
    outputs: tuple[str, ...] = ("logits",)
    extra: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameters that have no place in the Hugging Face model (the mask vector)."""
    head: Head | None = None
    """What makes logits of the graph's first output, where `split-head` took it out; None: the graph makes them."""
    quantized: dict[str, Any] = field(default_factory=dict)
    """Weights of the Hugging Face model that are held as codes (`flarec.ops.quantized.QuantizedWeight`), by every name
    that they have: what is lowered reads the codes (pass `quantize-base`)."""
    constants: Constants | None = None
    """Buffers of the module that stand for parameters, and what they are made of."""
    run: Callable[..., tuple[Tensor, ...]] | None = field(default=None, repr=False)
    """What runs instead of `module`, with its inputs in order: the compiled graph (`compiled`)."""

    def __post_init__(self) -> None:
        self.inputs = tuple(node.name for node in self.placeholders())
        """Names of what the module takes, in order: kept, because a compiler cannot look at an fx graph."""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def vocab_size(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @property
    def device(self) -> torch.device:
        for parameter in self.module.parameters():
            return parameter.device
        return next(iter(self.parameters().values())).device  # all of them are parts of merged ones

    def clone(self) -> Program:
        """A copy with its own graph; parameters and buffers are shared."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, mapping)
        graph.output(output)
        module = graph_module(self.module, graph)
        if self.head is not None:
            self.head.attach(self.module, module)
        return Program(
            module,
            self.config,
            self.family,
            self.dtype,
            self.properties,
            self.history,
            dict(self.derivations),
            self.cache_slots,
            self.outputs,
            dict(self.extra),
            self.head,
            dict(self.quantized),
            self.constants,
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        own = dict(self.module.named_parameters())
        kept = self.constants.sources if self.constants is not None else {}
        return own | {name: source for name, source in kept.items() if isinstance(source, nn.Parameter)}

    def derive(
        self,
        layout: Layout,
        capacity: int | None = None,
        *,
        moved: Layout | None = None,
        move: Callable[[Any], Any] | None = None,
    ) -> dict[str, Any]:
        """Everything that the graph reads from the layout, computed once for all layers, on the program's device.

        A layout may be given on the host, or know itself there (`StepLayout.host`): schedules whose sizes depend on it
        are then made there, without waiting for what the device is doing. moved: the same layout on the device, if it
        is there; move: brings a schedule there.
        """
        device = self.device
        moved = layout.to(device) if moved is None else moved
        bring: Callable[[Any], Any] = move or (lambda schedule: schedule.to(device))
        kept = layout.kept if isinstance(layout, StepLayout) and capacity is not None else None
        if isinstance(layout, StepLayout) and layout.host is not None:
            layout = layout.host

        def build(item: Derivation, layout: Layout, moved: Layout) -> Any:
            on_host = getattr(item, "on_host", False)
            return bring(item.build(layout, capacity)) if on_host else item.build(moved, capacity)

        found: dict[str, Any] = {}
        for name, item in self.derivations.items():
            if kept is None or not getattr(item, "relative", False):
                found[name] = build(item, layout, moved)
            elif item not in kept.built:
                found[name] = kept.built[item] = build(item, kept.layout, kept.layout.to(device))
            else:
                found[name] = kept.built[item]
        return found

    def __call__(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
        head_rows: Tensor | None = None,
        cache: CacheTensors | None = None,
        derived: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Run the graph and return the logits; caches are updated in place (`cache.tensors`).

        input_ids [rows, T] int64; position_ids [rows, T] only before `duplicate-streams`; head_rows [N] int64 flat
        indices row * T + slot. derived: `derive(layout)`, made here if it is not given. Logits are [N, V] with
        `narrow-head`, else [rows, T, V].

        `torch.compile(program, fullgraph=True)` compiles this; give it `derived` then (or take `compiled`).
        """
        results = self.results(
            input_ids, position_ids=position_ids, layout=layout, head_rows=head_rows, cache=cache, derived=derived
        )
        logits: Tensor = results[0] if self.head is None else self.head.logits(self.module, results[0])
        if cache is not None:
            cache.tensors.update({n: t for n, t in zip(self.outputs, results, strict=True) if n in cache.tensors})
        return logits

    def results(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
        head_rows: Tensor | None = None,
        cache: CacheTensors | None = None,
        derived: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the graph and return its `outputs`: with `split-head` hidden rows [N, D] first. Arguments of a call."""
        given = self.given(
            input_ids, position_ids=position_ids, layout=layout, head_rows=head_rows, cache=cache, derived=derived
        )
        if self.constants is not None and not torch.compiler.is_compiling():
            self.constants.refresh()
        run = self.module if self.run is None else self.run
        results: tuple[Tensor, ...] = run(*[given[name] for name in self.inputs])
        return results

    def given(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
        head_rows: Tensor | None = None,
        cache: CacheTensors | None = None,
        derived: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What a call hands over, by the names of the graph's inputs: tensors, and pytrees of tensors and integers.

        Raises `UsageError` inside a compiler if `derived` is missing: it is computed on the host.
        """
        given: dict[str, Any] = {"input_ids": input_ids}
        optional = {"position_ids": position_ids, "layout": layout, "head_rows": head_rows}
        given.update({name: value for name, value in optional.items() if value is not None})
        if self.derivations and derived is None:
            assert layout is not None, "this program derives tensors from a layout"
            if torch.compiler.is_compiling():
                raise UsageError(
                    "a compiled program takes what it reads from the layout as an argument; call it with "
                    "derived=program.derive(layout), or compile it with program.compiled()"
                )
            derived = self.derive(layout, self.capacity(cache))
        given.update(derived or {})
        if cache is not None:
            given.update({placeholder_name(name): tensor for name, tensor in cache.tensors.items()})
            given["accepted"] = cache.accepted
        return given

    def compiled(self, **options: Any) -> Program:
        """This program with its graph under `torch.compile`, as one graph; parameters stay shared.

        It is called as this one is; what it reads from the layout is derived outside of the compiled graph. options
        are those of `torch.compile` ("backend", "dynamic", ...). A pass cannot change it any more.
        """
        program = self.clone()
        compile_now(program.module)  # dynamo reads the code of a graph, and does not follow how it is made
        program.run = torch.compile(program.module, fullgraph=True, **options)
        return program

    def flat(self, given: Mapping[str, Any]) -> tuple[FlatGraph, list[Tensor | int]]:
        """The graph over plain tensors and integers, and the ones that it takes for `given` (of the method): for
        `torch.export`, and for CUDA graphs, whose buffers these tensors are."""
        leaves, structure = _pytree.tree_flatten([given[name] for name in self.inputs])
        return FlatGraph(self.module, structure), leaves

    def step(self, input_ids: Tensor, layout: Layout, head_rows: Tensor, cache: CacheTensors) -> Tensor:
        """One forward of the decode program without autograd; logits [N, V]."""
        with torch.no_grad():
            return self(input_ids, layout=layout, head_rows=head_rows, cache=cache)

    def capacity(self, cache: CacheTensors | None) -> int | None:
        if cache is None:
            return None
        keys = [slot.name for slot in self.cache_slots if slot.kind == "keys"]
        return cache.tensors[keys[0]].shape[2] if keys else 0

    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def placeholder(self, name: str) -> fx.Node:
        """The graph input of that name, made after the existing ones if it is not there yet."""
        existing = self.placeholders()
        for node in existing:
            if node.name == name:
                return node
        with self.graph.inserting_after(existing[-1]):
            node = self.graph.placeholder(name)
        assert node.name == name, f"graph input {name} collides with a node"
        return node

    def output_node(self) -> fx.Node:
        output: fx.Node = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        return output

    def add_outputs(self, named: Iterable[tuple[str, fx.Node]]) -> None:
        named = list(named)
        node = self.output_node()
        node.args = (tuple(node.args[0]) + tuple(value for _, value in named),)  # type: ignore[arg-type]
        self.outputs += tuple(name for name, _ in named)

    def calls(self, *targets: object) -> list[fx.Node]:
        """Call nodes with one of these targets, in graph order."""
        return [node for node in self.graph.nodes if node.op == "call_function" and node.target in targets]

    def op_counts(self) -> Counter[str]:
        return Counter(target_name(node) for node in self.graph.nodes if node.op == "call_function")

    def finish(self) -> None:
        """Recompile after a rewrite; the graph must be well formed."""
        self.graph.lint()
        compile_now(self.module)
        self.inputs = tuple(node.name for node in self.placeholders())


class FlatGraph(nn.Module):
    """A program's graph whose inputs are the leaves of the program's."""

    def __init__(self, module: fx.GraphModule, structure: _pytree.TreeSpec) -> None:
        super().__init__()
        self.module = module
        self.structure = structure

    def forward(self, *leaves: Tensor | int) -> tuple[Tensor, ...]:
        """The program's `outputs`."""
        results: tuple[Tensor, ...] = self.module(*_pytree.tree_unflatten(leaves, self.structure))
        return results


def placeholder_name(slot: str) -> str:
    """Graph input of a cache slot: dots are not allowed in names."""
    return slot.replace(".", "_")


def target_name(node: fx.Node) -> str:
    """Short name of what a call node does: `linear`, `flarec.softmax_attention`, `lowered.short_conv`, ..."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    label: str = getattr(target, "label", "")  # of a mixer's call (`flarec.ops`)
    return label or str(getattr(target, "__name__", target))


def layer_of(node: fx.Node) -> int | None:
    """Index of the decoder layer a node belongs to, None outside of the layers."""
    for path, _ in modules_of(node):
        match = LAYER.search(path)
        if match:
            return int(match.group(1))
    return None


def modules_of(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """(module path, class name) of the modules that a node was made in, the outermost first."""
    modules: tuple[tuple[str, str], ...] = node.meta.get("modules", ())
    return modules


def module_of(node: fx.Node) -> tuple[str, str]:
    """(module path, class name) of the innermost module that made the node; empty strings if unknown."""
    modules = modules_of(node)
    return modules[-1] if modules else ("", "")


def source_line(node: fx.Node) -> str:
    """`file:line` of the model code that made the node, or an empty string."""
    line: str = node.meta.get("source", "")
    return line


def locate(node: fx.Node) -> str:
    """Where a node is, for error messages: name, op, module and source line."""
    path, cls = module_of(node)
    line = source_line(node)
    return (
        f"node '{node.name}' ({target_name(node)})"
        + (f" in {path} ({cls})" if path else "")
        + (f" at {line}" if line else "")
    )
