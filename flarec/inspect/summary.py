"""A program as data: inputs, layers with their mixers (identical layers folded), head, caches and what passes did."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from flarec import lowered, ops, stream_ops
from flarec.ir.program import (
    LAYER,
    Program,
    layer_of,
    module_of,
    modules_of,
    placeholder_name,
    source_line,
    target_name,
)
from flarec.ir.spec import TensorSpec
from flarec.passes.narrow_head import find_head

from .shapes import shape_text

KINDS = ("softmax_attention", "short_conv", "linear_attention", "selective_scan", "gated_recurrence", "moe_experts")
NO_MIXER = "no token mixer"
_RECURRENCE = "clean: reset per document; noisy: from the clean state at the anchor"
READS = {
    "softmax_attention": "clean: causal per document; noisy: clean before the anchor + own block",
    "short_conv": "clean: causal per document; noisy: own block, then clean before the anchor",
    "linear_attention": _RECURRENCE,
    "selective_scan": _RECURRENCE,
    "gated_recurrence": _RECURRENCE,
    "moe_experts": "token by token",
}
"""What a mixer reads once it knows the layout (docs/semantics.md sections 1 and 2)."""


@dataclass(frozen=True)
class Mixer:
    """One token mixer or expert layer of a decoder layer.

    module    path inside the layer; kind one of `KINDS`; call: what the graph node calls
    operands  tensor operands and their shapes, symbolic in rows and T
    options   what else defines it ("scalar gate", "delta rule", "width 4", ...)
    streams   "one document per row" or "clean | noisy"; reads: what a token may see
    inputs    graph inputs it reads: the layout or tensors derived from it
    caches    kinds of its cache slots
    """

    module: str
    kind: str
    call: str
    operands: tuple[tuple[str, str], ...]
    options: tuple[str, ...]
    streams: str
    reads: str
    inputs: tuple[str, ...]
    caches: tuple[str, ...]
    node: str
    source: str


@dataclass(frozen=True)
class Part:
    """A child module of a layer: its path, class and linear layers as (in, out, count)."""

    module: str
    cls: str
    linears: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Group:
    """Identical layers. `nodes` = call nodes per layer; mixers name the nodes of the first layer."""

    layers: tuple[int, ...]
    cls: str
    parts: tuple[Part, ...]
    mixers: tuple[Mixer, ...]
    nodes: int


@dataclass(frozen=True)
class Step:
    """What one pass did: rewritten sites by kind, change of op counts, properties it provides."""

    step: str
    sites: tuple[tuple[str, int], ...]
    delta: tuple[tuple[str, int], ...]
    provides: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Summary:
    """Everything that `flarec inspect` shows. Shapes are text: rows, T (tokens per row), N (head rows) are symbols."""

    family: str
    model: str
    dtype: str
    parameters: int
    layers: int
    vocab_size: int
    properties: tuple[str, ...]
    inputs: tuple[tuple[str, str], ...]
    derived: tuple[tuple[str, str], ...]
    embedding: str
    extra: tuple[tuple[str, str], ...]
    groups: tuple[Group, ...]
    head: str
    outputs: tuple[str, ...]
    caches: tuple[tuple[str, str, str, int], ...]
    steps: tuple[Step, ...]
    ops: tuple[tuple[str, int], ...]

    def layer_kinds(self) -> dict[int, str]:
        """Layer index -> kinds of its mixers, joined by "+"; "no token mixer" for a layer that has none."""
        kinds = {}
        for group in self.groups:
            names = list(dict.fromkeys(mixer.kind for mixer in group.mixers if mixer.kind != "moe_experts"))
            kinds.update(dict.fromkeys(group.layers, " + ".join(names) or NO_MIXER))
        return dict(sorted(kinds.items()))


def summarize(program: Program) -> Summary:
    """Describe a program at any point of its pipeline; nothing is run."""
    layers = _layers(program)
    config = program.config
    names = getattr(config, "architectures", None) or [type(config).__name__]
    parameters = {id(p): p.numel() for p in program.module.parameters()}
    return Summary(
        family=program.family,
        model=str(names[0]),
        dtype=str(program.dtype).removeprefix("torch."),
        parameters=sum(parameters.values()),
        layers=len(layers),
        vocab_size=program.vocab_size,
        properties=tuple(sorted(program.properties)),
        inputs=tuple(_inputs(program)),
        derived=tuple((name, item.describe()) for name, item in program.derivations.items()),
        embedding=_embedding(program),
        extra=tuple((name, str(list(p.shape))) for name, p in program.extra.items()),
        groups=tuple(_groups(program, layers)),
        head=_head(program),
        outputs=program.outputs,
        caches=tuple(_caches(program)),
        steps=tuple(_steps(program)),
        ops=tuple(sorted(program.op_counts().items())),
    )


def mixer_kind(node: fx.Node) -> str | None:
    """Which semantic op a node is, at any stage of lowering; None for everything else."""
    if node.op != "call_function":
        return None
    target: Any = node.target
    if target in (*ops.TOKEN_MIXERS, ops.MOE_EXPERTS):
        return str(target_name(node).removeprefix("flarec."))
    if stream_ops.is_stream_op(target) or getattr(target, "__module__", "").startswith(lowered.__name__):
        name = str(target.__name__)
        return next((kind for kind in KINDS if kind in name), None)
    return None


def layer_nodes(program: Program, layer: int) -> list[fx.Node]:
    """Call nodes of one decoder layer, in graph order."""
    return _layers(program).get(layer, [])


def _layers(program: Program) -> dict[int, list[fx.Node]]:
    """Call nodes by decoder layer. Arithmetic on sizes is left out: the layer that comes first computes it for all."""
    layers: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        index = layer_of(node) if node.op == "call_function" else None
        sizes = getattr(node.target, "__module__", "") == "_operator" and node.target is not operator.getitem
        if index is not None and not sizes:
            layers.setdefault(index, []).append(node)
    return dict(sorted(layers.items()))


def _groups(program: Program, layers: dict[int, list[fx.Node]]) -> Iterator[Group]:
    """Fold layers with equal structure; groups are ordered by their first layer."""
    folded: dict[object, Group] = {}
    for index, nodes in layers.items():
        cls, parts = _parts(program, nodes)
        mixers = tuple(_mixer(program, node, kind) for node in nodes if (kind := mixer_kind(node)))
        key = (cls, parts, tuple(replace(mixer, node="", source="") for mixer in mixers), len(nodes))
        known = folded.get(key)
        group = Group((), cls, parts, mixers, len(nodes)) if known is None else known
        folded[key] = replace(group, layers=(*group.layers, index))
    yield from folded.values()


def _inside(path: str) -> str | None:
    """A module path without the prefix up to its decoder layer; None outside of the layers."""
    match = LAYER.search(path)
    return path[match.end() :] if match else None


def _parts(program: Program, nodes: Sequence[fx.Node]) -> tuple[str, tuple[Part, ...]]:
    cls, classes = "", dict[str, str]()
    linears: dict[str, Counter[tuple[int, int]]] = {}
    for node in nodes:
        for path, name in modules_of(node):
            inside = _inside(path)
            if inside is None:
                continue
            child = inside.split(".")[0]
            if not child:
                cls = name
            elif child not in classes or inside == child:
                classes[child] = name
            if inside and node.target is torch.ops.aten.linear.default and path == module_of(node)[0]:
                weight = node.args[1]
                if isinstance(weight, fx.Node) and "val" in weight.meta:
                    spec: TensorSpec = weight.meta["val"]
                    linears.setdefault(child, Counter())[spec.size(1), spec.size(0)] += 1
    return cls, tuple(
        Part(child, name, tuple((i, o, n) for (i, o), n in linears.get(child, Counter()).items()))
        for child, name in classes.items()
    )


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Operands of a mixer call by name."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        names = [argument.name for argument in target._schema.arguments]
    else:
        names = list(inspect.signature(target).parameters)
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _mixer(program: Program, node: fx.Node, kind: str) -> Mixer:
    arguments = _arguments(node)
    slots = {placeholder_name(slot.name): slot.kind for slot in program.cache_slots}
    operands, inputs, caches = [], [], []
    for name, value in arguments.items():
        if not isinstance(value, fx.Node):
            continue
        if value.op == "placeholder" and value.name in slots:
            caches.append(slots[value.name])
        elif value.op == "placeholder" and (value.name in program.derivations or value.name in ("layout", "accepted")):
            inputs.append(value.name)
        else:
            operands.append((name, shape_text(value)))
    aware = not isinstance(node.target, torch._ops.OpOverload)
    inside = _inside(module_of(node)[0])
    module = str(getattr(node.target, "__module__", "")).rsplit(".", 1)[-1]
    local = kind == "moe_experts"
    return Mixer(
        module=inside or "",
        kind=kind,
        call=f"{module}.{node.target.__name__}" if aware else target_name(node),  # type: ignore[union-attr]
        operands=tuple(operands),
        options=tuple(_options(kind, arguments)),
        streams="clean | noisy" if aware or ("two-stream" in program.properties and local) else "one document per row",
        reads=READS[kind] if aware or local else "causal over the row",
        inputs=tuple(inputs),
        caches=tuple(caches),
        node=node.name,
        source=source_line(node),
    )


def _options(kind: str, arguments: dict[str, Any]) -> Iterator[str]:
    if kind == "linear_attention":
        gate = arguments.get("g")
        dims = len(gate.meta["val"].shape) if isinstance(gate, fx.Node) else 0
        yield {0: "no gate", 3: "scalar gate"}.get(dims, "channel gate")
        yield "delta rule" if arguments["delta"] else "no delta rule"
        if arguments["l2norm"]:
            yield "q, k normalised"
    if kind == "short_conv":
        yield f"width {arguments['weight'].meta['val'].size(-1)}"
        yield f"activation {arguments.get('activation') or 'none'}"
    if kind == "selective_scan":
        yield f"{arguments['a'].meta['val'].size(1)} states per channel"
    if kind == "gated_recurrence":
        yield "one state per channel"
    if kind == "softmax_attention":
        for name in ("window", "softcap"):
            if arguments.get(name) is not None:
                yield f"{name} {arguments[name]}"
    if kind == "moe_experts":
        yield f"activation {arguments['activation']}"
        if not arguments.get("gated", True):
            yield "no gate"
    if "scale" in arguments:
        yield f"scale {arguments['scale']:.4g}"


def _inputs(program: Program) -> Iterator[tuple[str, str]]:
    slots = {placeholder_name(slot.name) for slot in program.cache_slots}
    known = {"input_ids": "token ids", "head_rows": "[N] rows of the head", "accepted": "[rows] pending rows to commit",
             "layout": "where clean and noisy tokens sit", "position_ids": "positions"}  # fmt: skip
    for node in program.placeholders():
        if node.name in slots or node.name in program.derivations:
            continue
        shape = shape_text(node)
        text = known.get(node.name, "")
        yield node.name, f"{shape} {text}".strip()


def _embedding(program: Program) -> str:
    for node in program.calls(torch.ops.aten.embedding.default):
        weight = node.args[0]
        assert isinstance(weight, fx.Node)
        size = list(program.module.get_parameter(str(weight.target)).shape)
        return f"{weight.target} {size}"
    return "none"


def _head(program: Program) -> str:
    node = find_head(program)
    if node is None:
        return "not recognised"
    weight = node.args[1]
    rows = "N" if "narrowed" in program.properties else "rows, T"
    target = weight.target if isinstance(weight, fx.Node) else "?"
    spec: TensorSpec | None = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    size = spec.shape if spec is not None else ()
    shape = f"[{rows}, {size[1]}] -> [{rows}, {size[0]}]" if len(size) == 2 else f"[{rows}, ...]"
    return f"{target} {shape}"


def _caches(program: Program) -> Iterator[tuple[str, str, str, int]]:
    """(kind, shape, dtype, count) of the cache slots, equal ones folded."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for slot in program.cache_slots:
        shape = "[" + ", ".join(str(size) for size in slot.shape) + "]"
        counts[slot.kind, shape, str(slot.dtype).removeprefix("torch.")] += 1
    for (kind, shape, dtype), count in counts.items():
        yield kind, shape, dtype, count


def _steps(program: Program) -> Iterator[Step]:
    for record in program.history:
        sites = Counter(_without_number(name) for name in record.sites)
        delta = tuple(sorted(record.delta.items(), key=lambda item: (-abs(item[1]), item[0])))
        yield Step(record.step, tuple(sites.most_common()), delta, record.provides, round(record.seconds, 3))


def _without_number(name: str) -> str:
    """`two_stream_short_conv_17` -> `two_stream_short_conv`."""
    head, _, tail = name.rpartition("_")
    return head if tail.isdigit() and head else name
