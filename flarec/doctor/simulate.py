"""Running a program without its numbers: shapes, live bytes and arithmetic of every operation, at any size.

Floating tensors are fake (sizes and strides, no memory); small index tensors are real, so that schedules, sizes and
splits that depend on the layout are those of a real run. What is executed is the program, the trainer and the decoder
themselves; nothing is estimated from a formula of a model.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from flarec.errors import CaptureError
from flarec.ir.program import Program
from flarec.ops.quantized import quantized_linear, quantized_linear_backward

ATEN = torch.ops.aten
REAL_ELEMENTS = 1 << 22
"""Index tensors up to this size are computed; larger ones (masks of long rows) are fake."""

MATMUL, BATCHED, ATTENTION, GATHER, MEMORY = "matmul", "batched matmul", "attention", "gather", "memory"
"""What bounds an operation: arithmetic of one of three kinds, rows fetched by index, or memory traffic."""

_MATMULS = {ATEN.mm, ATEN.addmm, ATEN.addmm_}
_BATCHED = {ATEN.bmm.default, ATEN.baddbmm.default, ATEN.linalg_solve_triangular.default}
_QUANTIZED = {quantized_linear, quantized_linear_backward}
_GATHERS = {
    ATEN.index_select.default, ATEN.embedding.default, ATEN.gather.default, ATEN.index.Tensor,
    ATEN.index_add.default, ATEN.index_add_.default, ATEN.index_copy_.default, ATEN.scatter_.src,
    ATEN.embedding_dense_backward.default,
}

_ONLY_FAKE = {torch.ops.prim.device.default}
"""What fake tensors dispatch to be asked where they are; no real tensor does."""


class Cell(NamedTuple):
    """Operations of one kind and of about one size: `moved` and `arithmetic` are powers of two above their bytes and
    floating point operations."""

    kind: str
    moved: int
    arithmetic: int


@dataclass
class Work:
    """What was executed, by cell: number of operations, floating point operations, and bytes read and written."""

    calls: Counter[Cell] = field(default_factory=Counter)
    flops: Counter[Cell] = field(default_factory=Counter)
    bytes: Counter[Cell] = field(default_factory=Counter)

    def add(self, kind: str, flops: int, moved: int) -> None:
        cell = Cell(kind, moved.bit_length(), flops.bit_length())
        self.calls[cell] += 1
        self.flops[cell] += flops
        self.bytes[cell] += moved

    def __sub__(self, other: Work) -> Work:
        """What was executed since `other`, an earlier copy."""
        return Work(self.calls - other.calls, self.flops - other.flops, self.bytes - other.bytes)

    def __add__(self, other: Work) -> Work:
        return Work(self.calls + other.calls, self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: int) -> Work:
        """The same work `count` times."""
        calls, flops, moved = (
            Counter({cell: count * value for cell, value in table.items()})
            for table in (self.calls, self.flops, self.bytes)
        )
        return Work(calls, flops, moved)

    def listed(self) -> list[list[Any]]:
        """Plain values: kind, moved, arithmetic, calls, flops, bytes of each cell."""
        return [[*cell, calls, self.flops[cell], self.bytes[cell]] for cell, calls in self.calls.items()]

    @staticmethod
    def of(listed: Iterable[Sequence[Any]]) -> Work:
        """What `listed` gave."""
        found = Work()
        for kind, moved, arithmetic, calls, flops, size in listed:
            cell = Cell(kind, moved, arithmetic)
            found.calls[cell], found.flops[cell], found.bytes[cell] = calls, flops, size
        return found

    def copy(self) -> Work:
        return Work(self.calls.copy(), self.flops.copy(), self.bytes.copy())


class Simulation(TorchDispatchMode):
    """A context in which torch runs as described above; `work`, `live` and `peak` tell what happened.

    live, peak   bytes of all tensors that exist now, and at most so far
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode()
        self.work = Work()
        self.live = self.peak = 0
        self._held: Any = WeakIdKeyDictionary()
        self._stand_ins: dict[object, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ONLY_FAKE:
            return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._hold(tensor)
        result = self._run(func, args, kwargs, inputs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func in _QUANTIZED:  # while it runs the weight is there
            weight = inputs[0].shape[-1] * outputs[0].shape[-1] * outputs[0].element_size()
            self.peak = max(self.peak, self.live + weight + outputs[0].nbytes)
        for tensor in outputs:
            self._hold(tensor)
        self._count(func, args, kwargs, inputs, outputs, result)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor]) -> Any:
        if any(self.is_fake(tensor) for tensor in inputs):
            return self._run_fake(func, args, kwargs, all(map(self.is_fake, inputs)))
        if func._schema.is_mutable:  # of real tensors
            return func(*args, **kwargs)
        if inputs and math.prod(tensor.numel() or 1 for tensor in inputs) <= REAL_ELEMENTS:
            return func(*args, **kwargs)  # no broadcast makes it large
        try:
            given, named = tree_map_only(Tensor, self._stand_in, (args, kwargs))
            with self.fake:
                result = func(*given, **named)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        small = sum(tensor.numel() for tensor in outputs) <= REAL_ELEMENTS
        wanted = small and (bool(inputs) or not any(tensor.is_floating_point() for tensor in outputs))
        return func(*args, **kwargs) if wanted else result

    def _run_fake(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], complete: bool) -> Any:
        if func is ATEN.bincount.default:
            return _equal_shares(args[0], *args[1:], **kwargs)
        if not complete:
            args, kwargs = tree_map_only(Tensor, self._stand_in, (args, kwargs))
        try:
            with self.fake:
                return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise CaptureError(
                f"{func} makes what follows depend on computed numbers, so memory and time cannot be told without "
                "weights; measure with `flarec convert --dry-run`"
            ) from error

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """A fake tensor for one whose numbers do not matter, because it meets a fake one; made once per shape."""
        if self.is_fake(tensor):
            return tensor
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in self._stand_ins:
            with self.fake:
                self._stand_ins[key] = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
        return self._stand_ins[key]

    def is_fake(self, tensor: Tensor) -> bool:
        return getattr(tensor, "fake_mode", None) is self.fake

    def _hold(self, tensor: Tensor) -> None:
        """Count the tensor's memory until nothing refers to it."""
        storage = tensor.untyped_storage()
        if storage in self._held:
            return
        size = storage.nbytes()
        self._held[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self.live -= size

    def forget_peak(self) -> None:
        """Let `peak` start again from what lives now."""
        self.peak = self.live

    def _count(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], outputs: list[Tensor],
        result: Any,
    ) -> None:
        known = {id(tensor.untyped_storage()) for tensor in inputs}
        new = [tensor for tensor in outputs if id(tensor.untyped_storage()) not in known]
        mutable = func._schema.is_mutable
        if not new and not mutable:
            self.work.add(MEMORY, 0, 0)  # a view moves nothing
            return
        if func in _GATHERS:
            moved = 2 * sum(map(moved_of, new)) + (2 * moved_of(inputs[-1]) if mutable else 0)
            self.work.add(GATHER, 0, moved)
            return
        written = _written(func, args) if mutable else []
        kind, flops = kind_of(func, args, kwargs, result)
        self.work.add(kind, flops, sum(map(moved_of, [*inputs, *new, *written])))


def kind_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[str, int]:
    """What bounds an operation that is no gather, and its floating point operations."""
    flops = _flops(func, args, kwargs, result)
    if not flops:
        return MEMORY, 0
    if func._overloadpacket in _MATMULS or func in _QUANTIZED:
        return MATMUL, flops
    return (BATCHED if func in _BATCHED else ATTENTION), flops


def moved_of(tensor: Tensor) -> int:
    """What an operation reads or writes of a tensor: expanded dimensions are one element in memory."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size


def _written(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that an operation changes."""
    changed = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)]


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Floating point operations of a matrix product or attention; 0 for everything else."""
    if func._overloadpacket in _MATMULS:  # in whatever dtype, and where the result is written
        left, right = [value for value in args if isinstance(value, Tensor)][-2:]
        return 2 * left.numel() * right.shape[-1]
    formula: Callable[..., int] | None = _FORMULAS.get(func) or flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    batch, heads, queries, width = q.shape
    return 2 * batch * heads * queries * k.shape[2] * (width + v.shape[3])


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return 5 * _attention_forward(q, k, v) // 2


def _quantized(x: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    return 2 * x.numel() * out_val.shape[-1]


def _triangular(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    return math.prod(b.shape) * a.shape[-1]


_FORMULAS: dict[Any, Callable[..., int]] = {  # what torch's own table leaves out
    ATEN._scaled_dot_product_flash_attention_for_cpu.default: _attention_forward,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    ATEN.linalg_solve_triangular.default: _triangular,
    quantized_linear: _quantized,
    quantized_linear_backward: _quantized,
}


def _equal_shares(index: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """`bincount` of indices that are not known: every expert gets the same number of tokens."""
    assert weights is None and minlength > 0, "only routed tokens are counted"
    share, rest = divmod(index.numel(), minlength)
    return torch.tensor([share + (expert < rest) for expert in range(minlength)])


def with_fake_weights(program: Program, simulation: Simulation, device: torch.device) -> Program:
    """The program (captured on the meta device) with weights that the simulation counts; the given one is unchanged."""
    copy = program.clone()
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        """Equal names of one tensor stay one tensor."""
        if id(tensor) not in made:
            with simulation.fake:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            made[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
            simulation._hold(made[id(tensor)])
        return made[id(tensor)]

    for module in copy.module.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in list(table.items()):
                if tensor is not None:
                    table[name] = fake(tensor)
    return copy
