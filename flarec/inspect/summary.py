"""A program as data: inputs, layers with their mixers (identical layers folded), head, caches and what passes did."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from flarec import ops
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
from flarec.passes.adapt_noisy_stream import adapter_parameters
from flarec.passes.narrow_head import find_head

from .shapes import shape_text

NO_MIXER = "no token mixer"


@dataclass(frozen=True)
class MixerSite:
    """One token mixer or expert layer of a decoder layer.

    module    path inside the layer; kind: name of its op (`flarec.ops`); call: what the graph node calls
    operands  tensor operands and their shapes, symbolic in rows and T
    options   what else defines it ("scalar gate", "delta rule", "width 4", ...)
    mixes     whether it moves information between tokens
    streams   "one document per row" or "clean | noisy"; reads: what a token may see
    inputs    graph inputs it reads: the layout or tensors derived from it
    caches    kinds of its cache slots
    """

    module: str
    kind: str
    call: str
    operands: tuple[tuple[str, str], ...]
    options: tuple[str, ...]
    mixes: bool
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
    mixers: tuple[MixerSite, ...]
    nodes: int


@dataclass(frozen=True)
class PassStep:
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
    adapter: str
    groups: tuple[Group, ...]
    head: str
    outputs: tuple[str, ...]
    caches: tuple[tuple[str, str, str, int], ...]
    steps: tuple[PassStep, ...]
    ops: tuple[tuple[str, int], ...]

    def layer_kinds(self) -> dict[int, str]:
        """Layer index -> kinds of its mixers, joined by "+"; "no token mixer" for a layer that has none."""
        kinds = {}
        for group in self.groups:
            names = list(dict.fromkeys(mixer.kind for mixer in group.mixers if mixer.mixes))
            kinds.update(dict.fromkeys(group.layers, " + ".join(names) or NO_MIXER))
        return dict(sorted(kinds.items()))


def _adapter(parameters: Mapping[str, Tensor]) -> str:
    """One line about the matrices of an adapter; empty without one."""
    if not parameters:
        return ""
    count = sum(parameter.numel() for parameter in parameters.values())
    return f"{len(parameters) // 2} linear layers on noisy rows, {count:,} of the parameters"


def summarize(program: Program) -> Summary:
    """Describe a program at any point of its pipeline; nothing is run."""
    layers = _layers(program)
    config = program.config
    names = getattr(config, "architectures", None) or [type(config).__name__]
    parameters = {id(p): p.numel() for p in program.module.parameters()}
    adapter = adapter_parameters(program)
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
        extra=tuple((name, str(list(p.shape))) for name, p in program.extra.items() if name not in adapter),
        adapter=_adapter(adapter),
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
    mixer = ops.mixer_of(node.target)
    return mixer.name if mixer else None


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
        mixers = tuple(_mixer(program, node, op) for node in nodes if (op := ops.mixer_of(node.target)))
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


def _mixer(program: Program, node: fx.Node, op: ops.Mixer) -> MixerSite:
    slots = {placeholder_name(slot.name): slot.kind for slot in program.cache_slots}
    operands, inputs, caches = [], [], []
    for name, value in node.kwargs.items():
        if not isinstance(value, fx.Node):
            continue
        if value.op == "placeholder" and value.name in slots:
            caches.append(slots[value.name])
        elif value.op == "placeholder" and (value.name in program.derivations or value.name in ("layout", "accepted")):
            inputs.append(value.name)
        else:
            operands.append((name, shape_text(value)))
    aware = isinstance(node.target, ops.Call)
    inside = _inside(module_of(node)[0])
    local = op.mixing == "none"
    return MixerSite(
        module=inside or "",
        kind=op.name,
        call=target_name(node),
        operands=tuple(operands),
        options=tuple(op.options(ops.site_of(node))),
        mixes=not local,
        streams="clean | noisy" if aware or ("two-stream" in program.properties and local) else "one document per row",
        reads=op.sees if aware or local else "causal over the row",
        inputs=tuple(inputs),
        caches=tuple(caches),
        node=node.name,
        source=source_line(node),
    )


def _inputs(program: Program) -> Iterator[tuple[str, str]]:
    slots = {placeholder_name(slot.name) for slot in program.cache_slots}
    known = {"input_ids": "token ids", "head_rows": "[N] rows of the head", "accepted": "[rows] pending rows to commit",
             "layout": "where clean and noisy tokens sit", "position_ids": "positions"}
    for node in program.placeholders():
        if node.name in slots or node.name in program.derivations:
            continue
        text = known.get(node.name, "")
        yield node.name, text if text.startswith("[") else f"{shape_text(node)} {text}".strip()


def _embedding(program: Program) -> str:
    for node in program.calls(torch.ops.aten.embedding.default):
        weight = node.args[0]
        assert isinstance(weight, fx.Node)
        size = list(program.module.get_parameter(str(weight.target)).shape)
        name, head = f"{module_of(node)[0]}.weight", head_weight(program)
        tied = weight.target == head and name != head  # one parameter has one name, the head's
        return f"{name} {size}, the head's own (tied)" if tied else f"{weight.target} {size}"
    return "none"


def head_weight(program: Program) -> str | None:
    """The name of the head's weight, in the graph or beside it."""
    if program.head is not None:
        return program.head.weight
    node = find_head(program)
    weight = node.args[1] if node is not None else None
    return str(weight.target) if isinstance(weight, fx.Node) else None


def _head(program: Program) -> str:
    if program.head is not None:
        count, width = program.module.get_parameter(program.head.weight).shape
        return f"{program.head.describe()} [N, {width}] -> [N, {count}], beside the graph"
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


def _steps(program: Program) -> Iterator[PassStep]:
    for record in program.history:
        sites = Counter(_without_number(name) for name in record.sites)
        delta = tuple(sorted(record.delta.items(), key=lambda item: (-abs(item[1]), item[0])))
        step = "capture()" if record.step.startswith("capture(") else record.step  # found in the cache or not: the same
        yield PassStep(step, tuple(sites.most_common()), delta, record.provides, round(record.seconds, 3))


def _without_number(name: str) -> str:
    """`two_stream_short_conv_17` -> `two_stream_short_conv`."""
    head, _, tail = name.rpartition("_")
    return head if tail.isdigit() and head else name
