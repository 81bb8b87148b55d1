"""Parameters that are cut over the ranks as well (ZeRO, stage 3): whole only while their decoder layer runs.

Between steps a rank has its part of a layer: the masters of trained parameters, from which they are rounded, and frozen
ones as they are. The layer is gathered before it runs, forward and backward, and its memory is given back behind it;
the next one is gathered meanwhile, on a GPU on a stream of its own. What belongs to no layer, or to several (embedding,
head, last norm, blocks that layers share), stays whole on every rank.

A parameter stays the tensor that it is, for graphs, compiled regions and what autograd has saved of it: only its
storage comes and goes. Buckets, sums and the optimizer are those of `flarec.train.sharding`, so that all bits are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import increment_version, register_multi_grad_hook

from ..errors import UsageError
from ..ir.compiled import Codes
from ..ir.outline import outline
from ..ir.program import Program, layer_of
from . import sharding
from .ranks.group import Ranks
from .recompute import compiled, rerun, units_of
from .sharding import Bucket, ShardedWeights, Stretch

OPTIMIZER: Final = "optimizer"
PARAMETERS: Final = "parameters"


def layers_of(program: Program) -> dict[str, int]:
    """By name the parameters that one decoder layer reads and nothing else does, with the index of the layer."""
    readers: dict[int, set[int | None]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            value = _parameter(program.module, str(node.target))
            readers.setdefault(id(value), set()).update(layer_of(user) for user in node.users)
    if program.head is not None:
        for value in program.head.parameters(program.module):
            readers.setdefault(id(value), set()).add(None)
    found: dict[str, int] = {}
    for name, parameter in program.parameters().items():
        layers = readers.get(id(parameter), set())
        layer = next(iter(layers), None)
        if len(layers) == 1 and layer is not None:
            found[name] = layer
    return found


def by_layer(program: Program, recompute: bool, codes: Codes | None = None) -> Program:
    """The program with its decoder layers as modules (`Layer`), computed again in the backward pass or not; parameters
    stay shared. codes: compiles the regions of each layer, and those outside of layers.

    Raises `UsageError` for a model whose layers cannot be called one behind the other.
    """
    copy = program.clone()
    again = {node.name: unit for node, unit in units_of(copy).items()} if recompute else {}
    numbers = dict.fromkeys(layer for layer in map(layer_of, copy.graph.nodes) if layer is not None)
    try:
        module = outline(copy.module, _name_of)
    except ValueError as error:
        raise UsageError(
            f"train.shard = parameters cannot be used with this model: {error}; set train.shard=optimizer"
        ) from error
    for number in numbers:
        unit = getattr(module, _name(number), None)
        if unit is None:  # nothing of it is read
            continue
        assert isinstance(unit, fx.GraphModule)
        inner: nn.Module = unit
        if recompute:
            inner = rerun(unit, lambda node: again.get(node.name), codes)
        elif codes is not None:
            inner = compiled(unit, codes)
        setattr(module, _name(number), Layer(inner, number))
    copy.run = module if codes is None else compiled(module, codes)
    return copy


def _name(layer: int) -> str:
    return f"whole_layer_{layer}"


def _name_of(node: fx.Node) -> str | None:
    layer = layer_of(node)
    return None if layer is None else _name(layer)


def _own(parameter: nn.Parameter) -> None:
    """Give a parameter memory of its own that can come and go: as it was read it may lie in a file."""
    storage = parameter.untyped_storage()
    if not (storage.resizable() and storage.nbytes() == parameter.nbytes and parameter.is_contiguous()):
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _parameter(module: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


class Layer(nn.Module):
    """A decoder layer that tells the weights when it runs, and when its backward pass begins."""

    def __init__(self, inner: nn.Module, number: int) -> None:
        super().__init__()
        self.inner = inner
        self.number = number
        self.weights: GatheredWeights | None = None

    def forward(self, *values: Any) -> tuple[Any, ...]:
        """The results of the layer, of values in the order of its placeholders."""
        weights, number = self.weights, self.number
        if weights is None:  # a layer without parameters of its own
            alone: tuple[Any, ...] = self.inner(*values)
            return alone
        weights.enter(number, ahead=1)
        results: tuple[Any, ...] = self.inner(*values)
        learning = [value for value in results if isinstance(value, Tensor) and value.requires_grad]
        if learning:  # before the first node of the layer: hooks come where the engine takes a node
            register_multi_grad_hook(learning, lambda _: weights.turn(number), mode="any")
        weights.leave(number, comes_back=bool(learning))
        return results


class GatheredWeights(ShardedWeights):
    """As `ShardedWeights`, with the parameters of `layers` in parts.

    every: the parameters of the program, trained or not. run: of `by_layer`. All are whole until their layer ran for
    the first time.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], exact: Mapping[str, Tensor] | None, ranks: Ranks,
        layers: Mapping[str, int], every: Mapping[str, nn.Parameter], run: nn.Module,
        coded: frozenset[str] = frozenset(),
    ) -> None:
        self.frozen = {name: every[name] for name in layers if name not in parameters}
        """What is kept in parts without being trained."""
        self.order = sorted(set(layers.values()))
        self.values: dict[int, dict[str, nn.Parameter]] = {layer: {} for layer in self.order}
        for name, layer in layers.items():
            _own(every[name])
            self.values[layer][name] = every[name]
        self.there = set(self.order)
        """Layers that are whole on this rank. Every rank gathers the same ones at the same moments."""
        self.coming: dict[int, Any] = {}
        """Layers that are being gathered, with the CUDA event behind it."""
        self.sizes: dict[str, int] = {}
        super().__init__(parameters, exact, ranks, layers, coded)
        self.parts: list[tuple[Stretch, Tensor]] = []
        for stretch in Stretch.all_of(self.frozen, layers, ranks, sharding.BUCKET_ELEMENTS):
            part = torch.zeros(stretch.length // ranks.size, dtype=stretch.dtype, device=self._device)
            stretch.fill(part, self.frozen)
            self.parts.append((stretch, part))
        stretches = [*(bucket.stretch for bucket in self.buckets), *(stretch for stretch, _ in self.parts)]
        most = max((s.length * s.dtype.itemsize for s in stretches if s.layer is not None), default=0)
        self.space = torch.empty(most, dtype=torch.uint8, device=self._device)
        self.stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        for module in run.modules():
            if isinstance(module, Layer) and module.number in self.values:
                module.weights = self

    def enter(self, layer: int, ahead: int) -> None:
        """The layer is whole from here on; gathering the one that comes next (ahead: 1 forward, -1 backward) begins."""
        self._start(layer)
        event = self.coming.pop(layer, None)
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        self.there.add(layer)
        place = self.order.index(layer) + ahead
        if 0 <= place < len(self.order):
            self._start(self.order[place])

    def leave(self, layer: int, *, comes_back: bool = False) -> None:
        """The layer is not read any more; one whose backward pass comes next stays."""
        if layer not in self.there or (comes_back and layer == self.order[-1]):
            return
        self.there.remove(layer)
        storages = {name: value.untyped_storage() for name, value in self.values[layer].items()}
        self.sizes |= {name: storage.nbytes() for name, storage in storages.items()}
        for storage in storages.values():
            storage.resize_(0)

    def turn(self, layer: int) -> None:
        """The backward pass of a layer begins, and so that of the layers behind it is over: autograd takes nodes that
        were made later first."""
        for other in [other for other in self.there if other != layer]:
            self.leave(other)
        while self._left and self._left[-1].layer is not None and self._left[-1].layer > layer:
            self._reduce(self._left.pop())
        self.enter(layer, ahead=-1)

    @torch.no_grad()
    def _start(self, layer: int) -> None:
        if layer in self.there or layer in self.coming:
            return
        values = self.values[layer]
        for name, parameter in values.items():  # memory of the stream that computes, which also gives it back
            parameter.untyped_storage().resize_(self.sizes[name])
        with self._beside():
            for stretch, part in self._parts_of(layer):
                whole = self.space[: stretch.length * stretch.dtype.itemsize].view(stretch.dtype)
                self.ranks.all_gather(whole, part)
                for span in stretch.spans:  # `data`: for autograd nothing changes
                    values[span.name].data.view(-1)[span.start : span.stop].copy_(whole[span.place])
        self.coming[layer] = None if self.stream is None else self.stream.record_event()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of gathering, behind all that was queued before."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self.stream):
            yield

    def _parts_of(self, layer: int) -> Iterator[tuple[Stretch, Tensor]]:
        for bucket in self.buckets:
            if bucket.layer == layer:
                yield bucket.stretch, bucket.rounded()
        for stretch, part in self.parts:
            if stretch.layer == layer:
                yield stretch, part

    def arrive(self, name: str) -> None:
        """Sums begin at turns alone: they and the gathering come in one order on every rank."""

    def _in_order(self) -> list[Bucket]:
        """Those of no layer first, which are added up last."""
        return sorted(self.buckets, key=lambda bucket: -1 if bucket.layer is None else bucket.layer)

    def collect(self) -> None:
        self._leave_all()
        super().collect()
        late = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        assert not late, f"the gradient of {late[0]} came behind its layer's backward pass"

    def _leave_all(self) -> None:
        for layer in [*self.coming]:
            self.enter(layer, ahead=len(self.order))
        for layer in [*self.there]:
            self.leave(layer)

    @torch.no_grad()
    def round(self) -> None:
        """What is whole becomes what the masters are; a layer that is not is gathered from them."""
        for bucket in self.buckets:
            if bucket.layer is None or bucket.layer in self.there:
                self._spread(bucket)
        increment_version([*self._values()])  # what was made of them is out of date

    def gather(self) -> None:
        """The first rank has all parameters whole, until `release`."""
        for layer in self.order:
            self.enter(layer, ahead=len(self.order))
            if not self.ranks.first:
                self.leave(layer)

    def release(self) -> None:
        self._leave_all()

    def widen(self) -> None:
        self.gather()
        super().widen()

    def _values(self) -> Iterable[nn.Parameter]:
        for values in self.values.values():
            yield from values.values()

    @property
    def bytes(self) -> int:
        """Of this rank: parts, what is whole, and two layers."""
        whole = sum(value.nbytes for name, value in self.parameters.items() if not self._is_cut(name))
        parts = sum(part.nbytes for _, part in self.parts) + self._training_bytes
        return whole + parts + largest_pair(self.values) + sum(space.nbytes for space in (self.space, *self._spaces))

    def _is_cut(self, name: str) -> bool:
        return any(name in values for values in self.values.values())


def largest_pair(layers: Mapping[int, Mapping[str, Tensor]]) -> int:
    """Bytes of the two largest layers: the one that runs, and the next one."""
    return sum(sorted(sum(value.nbytes for value in values.values()) for values in layers.values())[-2:])

