"""Layers of one kind are traced once: in the graph the others are copies of its nodes, with parameters of their own.

A trace on symbolic sizes takes 0.2 s and more for a layer, and models repeat few kinds of layers. Two layers are of one
kind if their modules are the same class by class and attribute by attribute (`alike`), and if they are called with the
same arguments but for the hidden states. What may differ is the layer's index, as long as its forward does not read it:
it meets an `Index`, which notes that. Whatever else could make a difference (hooks, attributes set on the way,
parameters or objects that layers share, tensors handed on behind a layer's back) has every such layer traced.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ir.module import bind
from .alike import PLAIN, alike, equal
from .index import Index

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ENTER, LEAVE, AGAIN = range(3)


class NotShared(Exception):
    """A graph in which the layers cannot be told apart: trace all of them."""


@torch.library.custom_op("flarec::layer_boundary", mutates_args=())
def boundary(hidden: Tensor, layer: int, place: int) -> Tensor:
    """Where a layer begins or ends in a trace, or stands for one that is not traced; no program holds it."""
    return hidden.clone()


@boundary.register_fake
def _(hidden: Tensor, layer: int, place: int) -> Tensor:
    return torch.empty_like(hidden)


boundary.register_autograd(lambda ctx, grad: (grad, None, None))
BOUNDARY = torch.ops.flarec.layer_boundary.default


@dataclass
class Kind:
    """Layers whose modules are alike; `indices` are the attributes (module, name) that hold the layer's index."""

    first: int
    indices: set[tuple[str, str]] = field(default_factory=set)
    members: list[int] = field(default_factory=list)


@dataclass
class Traced:
    """A call of a layer that others may repeat."""

    layer: int
    arguments: tuple[Any, ...]
    pack: Callable[[Tensor], Any]


class SharedLayers:
    """The layers of one trace: which were traced, and which repeat which."""

    def __init__(self, prefix: str, layers: nn.ModuleList) -> None:
        self.prefix = prefix
        self.layers = layers
        self.kinds = _kinds(layers)
        self.traced: dict[int, list[Traced]] = {kind.first: [] for kind in self.kinds}
        self.repeats: dict[int, int] = {}

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Within the context a layer that repeats a traced one is a call of `boundary`."""
        with contextlib.ExitStack() as stack:
            for kind in self.kinds:
                for index in kind.members:
                    layer = self.layers[index]
                    if "forward" in vars(layer):
                        continue  # somebody else's
                    layer.forward = self._forward(kind, index, layer.forward)
                    stack.callback(vars(layer).pop, "forward")
            yield

    def _forward(self, kind: Kind, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            layer = self.layers[index]
            named = {} if args else dict(kwargs)
            hidden = args[0] if args else named.pop("hidden_states", None)
            arguments = (_state(hidden), args[1:], tuple((kwargs if args else named).items()))
            if not isinstance(hidden, Tensor) or not _constant(arguments) or _has_hooks(layer):
                return own(*args, **kwargs)
            for traced in self.traced[kind.first]:
                if equal(traced.arguments, arguments):
                    self.repeats[index] = traced.layer
                    return traced.pack(boundary(hidden, index, AGAIN))
            entered = boundary(hidden, index, ENTER)
            inner = ((entered, *args[1:]), kwargs) if args else ((), {"hidden_states": entered, **named})
            before = _attributes(layer)
            with _indices(layer, kind) as found:
                result = own(*inner[0], **inner[1])
            unchanged = before == _attributes(layer)
            single, pack = _packing(result)
            if single is None:
                return result
            left = boundary(single, index, LEAVE)
            if unchanged and _state(left) == _state(hidden) and not any(number.read for number in found):
                self.traced[kind.first].append(Traced(index, arguments, pack))
            return pack(left)

        return forward

    def expand(self, module: fx.GraphModule, model: nn.Module) -> None:
        """Put the copies in, and take the boundaries out. Raises `NotShared` if a layer's nodes are not its own."""
        graph = module.graph
        places: dict[tuple[int, int], fx.Node] = {
            (int(node.args[1]), int(node.args[2])): node
            for node in graph.find_nodes(op="call_function", target=BOUNDARY)
        }
        if sum(place == AGAIN for _, place in places) != len(self.repeats):
            raise NotShared
        nodes = list(graph.nodes)
        position = {node: number for number, node in enumerate(nodes)}
        bodies = {}
        for layer in set(self.repeats.values()):
            enter, leave = places.get((layer, ENTER)), places.get((layer, LEAVE))
            if enter is None or leave is None:
                raise NotShared
            bodies[layer] = nodes[position[enter] + 1 : position[leave]]
            self._check_own(graph, bodies[layer], layer, leave)
        reads = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
        for index, layer in self.repeats.items():
            again, enter, leave = places[index, AGAIN], places[layer, ENTER], places[layer, LEAVE]
            copied = _Copy(module, model, f"{self.prefix}.{layer}", f"{self.prefix}.{index}", again, reads)
            copied.nodes[enter] = again.args[0]
            result = copied.body(bodies[layer], leave.args[0])
            again.replace_all_uses_with(result)
            graph.erase_node(again)
        for (_, place), node in places.items():
            if place != AGAIN:
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                graph.erase_node(node)

    def _check_own(self, graph: fx.Graph, body: list[fx.Node], layer: int, leave: fx.Node) -> None:
        """The layer's parameters are read within its nodes only, and no tensor of its leaves it but the result."""
        inside = set(body)
        for node in graph.find_nodes(op="get_attr"):
            if str(node.target).startswith(f"{self.prefix}.{layer}.") and not inside.issuperset(node.users):
                raise NotShared
        for node in body:
            if "val" in node.meta and any(user not in inside and user is not leave for user in node.users):
                raise NotShared


class _Copy:
    """Copies nodes from one layer to another, before the node `place`; `reads` are the nodes that read a tensor."""

    def __init__(
        self, module: fx.GraphModule, model: nn.Module, source: str, target: str, place: fx.Node,
        reads: dict[str, fx.Node],
    ) -> None:
        self.module, self.model, self.reads = module, model, reads
        self.source, self.target = source, target
        self.place = place
        self.nodes: dict[fx.Node, Any] = {}

    def body(self, nodes: list[fx.Node], result: Any) -> Any:
        with self.module.graph.inserting_before(self.place):
            for node in nodes:
                if node.op == "get_attr":
                    continue
                # a size, of what both layers see: one node, as the tracer has it
                common = "val" not in node.meta and all(self._mapped(node) is node for node in node.all_input_nodes)
                self.nodes[node] = node if common else self._copied(self.module.graph, node, self._mapped)
            return fx.node.map_arg(result, self._mapped)

    def _copied(self, graph: fx.Graph, node: fx.Node, mapped: Callable[[fx.Node], Any]) -> fx.Node:
        new = graph.node_copy(node, mapped)
        new.meta = dict(node.meta)
        if "modules" in new.meta:
            new.meta["modules"] = tuple((self._renamed(path), cls) for path, cls in new.meta["modules"])
        return new

    def _mapped(self, node: fx.Node) -> Any:
        if node not in self.nodes:
            self.nodes[node] = self._read(node) if node.op == "get_attr" else node
        return self.nodes[node]

    def _read(self, node: fx.Node) -> fx.Node:
        """The same of the other layer: its tensor, or a copy of the region."""
        name = str(node.target)
        if isinstance(region := getattr(self.module, name, None), fx.GraphModule):
            new = f"{name}_{self.target.replace('.', '_')}"
            self.module.add_module(new, self._region(region))
        elif (new := self._renamed(name)) == name:
            return node
        elif new in self.reads:
            return self.reads[new]
        elif not _has(self.module, new):
            bind(self.module, new, _tensor(self.model, new))
        read = self.reads[new] = self.module.graph.get_attr(new)
        read.meta = dict(node.meta)
        return read

    def _region(self, region: fx.GraphModule) -> fx.GraphModule:
        new = copy.deepcopy(region)
        for node in new.graph.nodes:
            if node.op == "get_attr":
                raise NotShared
            if "modules" in node.meta:
                node.meta["modules"] = tuple((self._renamed(path), cls) for path, cls in node.meta["modules"])
        return new

    def _renamed(self, path: str) -> str:
        return self.target + path[len(self.source) :] if f"{path}.".startswith(f"{self.source}.") else path


def _kinds(layers: nn.ModuleList) -> list[Kind]:
    """Those with more than one layer; layers that share a tensor with others are left out."""
    owners = Counter(id(tensor) for layer in layers for tensor in {*layer.parameters(), *layer.buffers()})
    kinds: list[Kind] = []
    for index, layer in enumerate(layers):
        if any(owners[id(tensor)] > 1 for tensor in (*layer.parameters(), *layer.buffers())):
            continue
        for kind in kinds:
            different = alike(layers[kind.first], layer, kind.first, index)
            if different is not None:
                kind.members.append(index)
                kind.indices |= different
                break
        else:
            kinds.append(Kind(index, members=[index]))
    return [kind for kind in kinds if len(kind.members) > 1]


def _constant(value: Any) -> bool:
    """Whether an argument holds nothing that a layer could write into."""
    if isinstance(value, tuple):
        return all(_constant(part) for part in value)
    return isinstance(value, (Tensor, *PLAIN))


def _state(hidden: Any) -> tuple[Any, ...]:
    """What a layer can see of its hidden states but for their values, and the modes of torch that it runs in."""
    if not isinstance(hidden, Tensor):
        return ()
    sizes = tuple(str(size) for size in (*hidden.shape, *hidden.stride()))
    kind = hidden.device.type
    modes = (torch.is_grad_enabled(), torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))
    return (sizes, str(hidden.dtype), str(hidden.device), hidden.requires_grad, *modes)


def _has_hooks(layer: nn.Module) -> bool:
    return any(vars(module).get(name) for module in layer.modules() for name in HOOKS)


def _packing(result: Any) -> tuple[Tensor | None, Callable[[Tensor], Any]]:
    """The one tensor of a layer's result, and how the result is made of it; None if there are more."""
    if isinstance(result, Tensor):
        return result, lambda tensor: tensor
    if type(result) is tuple:
        places = [place for place, value in enumerate(result) if isinstance(value, Tensor)]
        if len(places) == 1 and all(value is None for place, value in enumerate(result) if place != places[0]):
            before, after = result[: places[0]], result[places[0] + 1 :]
            return result[places[0]], lambda tensor: (*before, tensor, *after)
    return None, lambda tensor: tensor


@contextlib.contextmanager
def _indices(layer: nn.Module, kind: Kind) -> Iterator[list[Index]]:
    """Within the context the layer's index is an `Index` wherever it is kept."""
    places = [(vars(layer.get_submodule(module)), name) for module, name in kind.indices]
    kept = [attributes[name] for attributes, name in places]
    found = [Index(value) for value in kept]
    try:
        for (attributes, name), index in zip(places, found, strict=True):
            attributes[name] = index
        yield found
    finally:
        for (attributes, name), value in zip(places, kept, strict=True):
            attributes[name] = value


def _attributes(layer: nn.Module) -> list[tuple[str, int]]:
    """What the layer's modules hold, one level into their lists and dicts: the names and the objects."""
    found = []
    for module in layer.modules():
        for name, value in vars(module).items():
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            found += [(name, id(value)), *((name, id(part)) for part in inner)]
    return found


def _has(module: nn.Module, name: str) -> bool:
    try:
        operator.attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def _tensor(model: nn.Module, name: str) -> Tensor:
    tensor: Tensor = operator.attrgetter(name)(model)
    return tensor
