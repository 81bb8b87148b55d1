"""A step as a CUDA graph: everything between two reports runs on the device, from and into buffers that stay in place.

The buffers of a `Store` hold the cache, the mode's state and the sampling parameters of all slots. A step of the first
`n` slots is a function of views of them, without arguments and results: it reads what the step before wrote. Its first
use runs it, its second one checks that nothing waits for the device, its third one captures it, and from then on it is
replayed. A graph belongs to a number of slots, a capacity of the key caches, a step shape, the pending rows that it
finds and the kinds of sampling.

What a step leaves pending lies in its buffers without gaps, where the mode keeps its shapes for long (`Mode.lasting`):
a step of one clean row per request then fills and reads them as it would fill and read buffers of one row, in a copy or
two for all layers. A step with more rows finds them spread (`Store.spread`), one with fewer has a graph of its own.

`Replays` records and replays. `CudaReplays` needs a GPU; `PlainReplays` calls the function, for tests of all
the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter as clock
from typing import Any, Protocol

import torch
from torch import Tensor

from flarec.ir.slots import CacheSlot

from .cache import Cache
from .plan import DecodeProgram, StepPlan, StepShape
from .rows import Rows
from .sampling import SamplingRows
from .stats import DecodeStats

SMALLEST_CAPACITY = 256
SETTLE = 6
"""Replays behind a step that was recorded whose time says little: while the host recorded, or compiled, the device had
nothing to do."""
Function = Callable[[], None]


@dataclass(frozen=True)
class GraphKey:
    """What a graph is made for: a change of any of these is another graph. held: pending rows per slot that it finds;
    static: of `Store.static`."""

    shape: StepShape
    capacity: int
    held: int
    truncated: bool
    sampled: bool
    static: bool = False


class Replays(Protocol):
    """How a step's function becomes something to be replayed."""

    def checked(self, function: Function) -> str | None:
        """Run it; why it cannot be recorded (it waited for the device), or None."""
        ...

    def record(self, function: Function) -> Function:
        """Record it without running it; returns the replay."""
        ...

    def read(self, tensor: Tensor) -> list[list[int]]:
        """The values of a tensor [n, k] on the host: the one wait of a step."""
        ...


class PlainReplays:
    """The same steps without a GPU: a replay calls the function."""

    def checked(self, function: Function) -> str | None:
        function()
        return None

    def record(self, function: Function) -> Function:
        return function

    def read(self, tensor: Tensor) -> list[list[int]]:
        values: list[list[int]] = tensor.tolist()
        return values


class CudaReplays:
    """CUDA graphs in one private memory pool. They are replayed one after another, so they may share it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._host: Tensor | None = None
        self._copied = torch.cuda.Event()

    def checked(self, function: Function) -> str | None:
        """A step that waits is run again from the start: it reads only what the step before left."""
        try:
            with _no_waits():
                function()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            function()
            return f"a step of this model waits for the device ({_where(error)})"
        return None

    def record(self, function: Function) -> Function:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(
            graph, pool=self._pool, capture_error_mode="thread_local"
        ):
            function()
        replay: Function = graph.replay
        return replay

    def read(self, tensor: Tensor) -> list[list[int]]:
        size = tensor.numel()
        if self._host is None or self._host.numel() < size:
            self._host = torch.empty(max(1024, size), dtype=tensor.dtype, pin_memory=True)
        host = self._host[:size].view(tensor.shape)
        host.copy_(tensor, non_blocking=True)
        self._copied.record()
        self._copied.synchronize()
        values: list[list[int]] = host.tolist()
        return values


@contextmanager
def _no_waits() -> Any:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _where(error: BaseException) -> str:
    """File and line that raised, below this package's own folder where possible."""
    found, trace = "", error.__traceback__
    while trace is not None:
        found = f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


@dataclass
class Store:
    """Buffers of `slots` requests of one lane, and the graphs over them. One lane uses it at a time.

    program   runs the steps; bare: those without noisy rows, if another one does
    static    runs them in its place once the engine has made `after` steps, bare_static likewise; None: nothing does
    cache     room for `cache.capacity` positions and `pending` clean rows per slot
    unsettled replays until a step's time says something again
    held      how many pending rows per slot lie there now, one slot's behind the other's; at first all that have room
    state     what the mode keeps
    active    [slots] bool: whether a request is in the slot
    results   [slots * width] int64: what `Mode.read` returned, row behind row
    suppress, plans, constants   of `Rows`: graphs read their tensors, which must live as long as they do
    """

    program: DecodeProgram
    slots: int
    pending: int
    recorder: Replays
    cache: Cache
    state: dict[str, Tensor]
    sampling: SamplingRows
    active: Tensor
    results: Tensor
    suppress: Tensor | None
    plans: dict[StepShape, StepPlan]
    constants: dict[tuple[int, tuple[int, ...]], Tensor] = field(default_factory=dict)
    uses: dict[GraphKey, int] = field(default_factory=dict)
    widths: dict[GraphKey, int] = field(default_factory=dict)
    replays: dict[GraphKey, Function] = field(default_factory=dict)
    static: DecodeProgram | None = None
    bare: DecodeProgram | None = None
    bare_static: DecodeProgram | None = None
    after: int = 0
    held: int = 0
    unsettled: int = 0
    functions: dict[GraphKey, Function] = field(default_factory=dict)
    """What was recorded. A graph knows addresses only; these keep alive what lies there."""

    @staticmethod
    def allocate(
        program: DecodeProgram, slots: int, capacity: int, pending: int, like: Rows, recorder: Replays
    ) -> Store:
        """Empty buffers for rows like these."""
        device, layout = like.device, program.cache_slots
        cache = Cache.allocate(layout, slots, power_of_two(capacity, SMALLEST_CAPACITY), device, pending)
        state = {name: t.new_zeros(slots, *t.shape[1:]) for name, t in like.state.items()}
        sampling = like.sampling.changed(lambda values: values.new_zeros(slots), False, False)
        active = torch.zeros(slots, dtype=torch.bool, device=device)
        results = torch.zeros(slots * (2 * pending + 4), dtype=torch.int64, device=device)
        kept = None if like.suppress is None else like.suppress.clone()
        return Store(
            program, slots, pending, recorder, cache, state, sampling, active, results, kept, {}, held=pending
        )

    def views(self, slots: int, capacity: int, held: int) -> dict[str, Tensor]:
        """The cache of the first slots and positions, with that many pending rows per slot."""
        return {slot.name: self._view(slot, slots, capacity, held) for slot in self.cache.slots}

    def _view(self, slot: CacheSlot, slots: int, capacity: int, held: int) -> Tensor:
        tensor, axis = self.cache.tensors[slot.name], slot.pending_dim()
        if axis is not None:
            tensor = _without_gaps(tensor, axis, tensor.shape[axis] - self.pending + held)
        tensor = tensor.narrow(slot.batch_dim(), 0, slots)
        return tensor.narrow(slot.shape.index("capacity"), 0, capacity) if slot.in_place else tensor

    @cached_property
    def leaves_pending(self) -> bool:
        return any(slot.pending_dim() is not None for slot in self.cache.slots)

    def pending_rows(self, cache: Cache) -> int:
        """How many pending rows per request lie in another cache of the program."""
        for slot in self.cache.slots:
            if (axis := slot.pending_dim()) is not None:
                return cache.tensors[slot.name].shape[axis] - self.cache.tensors[slot.name].shape[axis] + self.pending
        return self.pending

    def spread(self, held: int) -> None:
        """Let more pending rows per slot lie there: those that do, and zeros behind them."""
        if held <= self.held:
            return
        slots = [slot for slot in self.cache.slots if slot.pending_dim() is not None]
        old, new = (
            [self._view(slot, self.slots, self.cache.capacity, rows) for slot in slots] for rows in (self.held, held)
        )
        kept = [torch.empty_like(tensor) for tensor in old]
        _copy(zip(kept, old, strict=True))
        for tensor in new:
            tensor.zero_()
        _copy(map(_place, zip(new, kept, slots, strict=True)))
        self.held = held

    def per_slot(self) -> list[tuple[Tensor, int]]:
        """Every buffer that has a row per slot, and the axis of the slots."""
        views = self.views(self.slots, self.cache.capacity, self.held)
        cached = [(views[slot.name], slot.batch_dim()) for slot in self.cache.slots]
        others = [self.cache.accepted, self.cache.length, self.active, *self.state.values(), *self.sampling.tensors()]
        return cached + [(tensor, 0) for tensor in others]

    def copy(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        for tensor, axis in self.per_slot():
            tensor.narrow(axis, target, 1).copy_(tensor.narrow(axis, source, 1))

    def clear(self, slot: int | None = None) -> None:
        """Nobody is in a slot, or in any: it computes with an empty cache, chooses greedily, and accepts nothing. What
        was not finite there must not meet the next request."""
        if slot is None:
            self.held = self.pending  # all of the memory
        for tensor, axis in self.per_slot():
            (tensor if slot is None else tensor.narrow(axis, slot, 1)).zero_()
        for tensor in (self.sampling.top_k, self.sampling.top_p):  # none of zero tokens is a token of the vocabulary
            (tensor if slot is None else tensor.narrow(0, slot, 1)).fill_(1)


def power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least both."""
    return max(least, 1 << max(0, value - 1).bit_length())


class StaticRows(Rows):
    """Rows in the slots of a `Store`; a step computes the smallest power of two of slots that holds all of them."""

    most_plans = None  # graphs read them, and widths are few

    def __init__(self, store: Store, like: Rows, stats: DecodeStats) -> None:
        self.program, self.mode, self.blocks = store.program, like.mode, like.blocks
        self.device, self.suppress, self.plans = like.device, store.suppress, store.plans
        self.constants = store.constants
        self.store = store
        self.stats = stats
        self.requests = []
        self.truncated = self.sampled = False
        self._kind: tuple[Any, ...] = ()
        self._replay: Function | None = None
        store.clear()

    @property
    def width(self) -> int:
        return min(self.store.slots, power_of_two(len(self.requests)))

    def fits(self, more: int, capacity: int) -> bool:
        return len(self.requests) + more <= self.store.slots and capacity <= self.store.cache.capacity

    def exposed(self) -> Rows:
        """Itself as plain rows, to be joined elsewhere."""
        count, store = len(self.requests), self.store
        cached = store.views(count, store.cache.capacity, store.held)
        lengths = store.cache.accepted[:count], store.cache.length[:count]
        self.cache = Cache(store.cache.slots, cached, *lengths, store.cache.capacity)
        self.state = {name: tensor[:count] for name, tensor in store.state.items()}
        self.sampling = store.sampling.changed(lambda values: values[:count], self.truncated, self.sampled)
        return self

    def step(self) -> None:
        shape = self.mode.shape(self)
        capacity = min(power_of_two(self.longest() + shape.clean, SMALLEST_CAPACITY), self.store.cache.capacity)
        static = self.store.static is not None and self.stats.steps >= self.store.after
        if self.store.held != shape.clean:  # from more rows to fewer is one graph, however many they were
            self.store.spread(shape.clean if self.store.held < shape.clean else self.store.pending)
        kind = shape, capacity, self.store.held, self.truncated, self.sampled, static
        if kind != self._kind:  # most steps are like the one before
            self._kind, self._key = kind, GraphKey(*kind)
            self._replay = self.store.replays.get(self._key)
        settled = (self._replay is not None and not self.store.unsettled) or bool(self.stats.eager)
        start = clock()
        if self._replay is not None:
            self.store.unsettled = max(0, self.store.unsettled - 1)
            self._replay()
            self.stats.replays += 1
        else:
            self._run(self._key)
            self._replay = self.store.replays.get(self._key)
        self.store.held = self._left(shape)
        width = self.store.widths[self._key]
        values = self.store.results[: len(self.requests) * width].view(-1, width)
        self._report(self.store.recorder.read(values))
        if settled and self.timed:
            self.mode.timed(shape, clock() - start)

    def _left(self, shape: StepShape) -> int:
        """Room for pending rows per slot behind a step. Where steps differ all the time it stays what it is."""
        return shape.clean if self.mode.lasting and self.store.leaves_pending else self.store.pending

    def _run(self, key: GraphKey) -> None:
        """A step of which there is no graph yet."""
        store, self.store.unsettled = self.store, SETTLE
        uses = store.uses[key] = store.uses.get(key, 0) + 1
        if uses == 1 or self.stats.eager:
            self._function(key)()
        elif uses == 2:
            self.stats.eager = store.recorder.checked(self._function(key)) or ""
        else:
            # a step that is recorded never ends half-way, and so is never run again from its start
            store.functions[key] = function = self._function(key, overwrites=True)
            store.replays[key] = store.recorder.record(function)
            self.stats.graphs += 1
            store.replays[key]()
            self.stats.replays += 1

    def _function(self, key: GraphKey, *, overwrites: bool = False) -> Function:
        """The step, from the buffers into the buffers. overwrites: layers may write into the buffers of states."""
        store, rows = self.store, key.shape.rows
        cached = store.views(rows, key.capacity, key.held)
        left = store.views(rows, key.capacity, self._left(key.shape))
        accepted, length = store.cache.accepted[:rows], store.cache.length[:rows]
        state = {name: tensor[:rows] for name, tensor in store.state.items()}
        sampling = store.sampling.changed(lambda values: values[:rows], key.truncated, key.sampled)

        program, static = store.program, store.static
        if store.bare is not None and not key.shape.blocks:
            program, static = store.bare, store.bare_static
        if key.static and static is not None:
            program = static

        def run() -> None:
            self.program, self.overwrites = program, overwrites
            self.cache = Cache(store.cache.slots, dict(cached), accepted, length, key.capacity)
            self.state, self.sampling, self.active = dict(state), sampling, store.active[:rows]
            values = self.compute(key.shape)
            store.widths[key] = values.shape[1]
            written = [(store.results[: values.numel()].view(values.shape), values), (length, self.cache.length)]
            written += [(accepted, self.cache.accepted), *((state[name], new) for name, new in self.state.items())]
            # every layer has read its pending rows: others may lie where they were
            slots = [(left[slot.name], self.cache.tensors[slot.name], slot) for slot in store.cache.slots]
            _copy([*map(_place, slots), *written])

        return run

    def retire(self) -> None:
        """The last request takes the place of one that ended."""
        for slot in reversed(range(len(self.requests))):
            if not self.requests[slot].finished:
                continue
            last = len(self.requests) - 1
            if slot != last:
                self.store.copy(last, slot)
                self.requests[slot] = self.requests[last]
            self.requests.pop()
            self.store.clear(last)

    def join(self, other: Rows) -> None:
        store, first, count = self.store, len(self.requests), len(other.requests)
        assert first + count <= store.slots and other.cache.capacity <= store.cache.capacity
        held = store.pending_rows(other.cache)
        if self.requests:
            store.spread(held)
        elif self.mode.lasting:  # the buffers are empty
            store.held = held
        views = store.views(store.slots, store.cache.capacity, store.held)
        for slot in store.cache.slots:
            target, source = views[slot.name].narrow(slot.batch_dim(), first, count), other.cache.tensors[slot.name]
            if slot.in_place:
                axis = slot.shape.index("capacity")
                target = target.narrow(axis, 0, source.shape[axis])
            elif slot.pending_dim() is not None:
                target.zero_()  # behind fewer rows than there is room for nothing is left of others
            _copy([_place((target, source, slot))])
        pairs = [(store.cache.accepted, other.cache.accepted), (store.cache.length, other.cache.length)]
        pairs += zip(store.sampling.tensors(), other.sampling.tensors(), strict=True)
        pairs += [(store.state[name], tensor) for name, tensor in other.state.items()]
        for buffer, rows in pairs:
            buffer[first : first + count].copy_(rows)
        store.active[first : first + count] = True
        self.requests += other.requests
        self.truncated |= other.sampling.truncated
        self.sampled |= other.sampling.sampled


def _without_gaps(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Less of a dense tensor along an axis, as a dense tensor in its memory with the same order of axes."""
    shape, strides, stride = list(tensor.shape), [0] * tensor.ndim, 1
    if shape[axis] == size:
        return tensor
    shape[axis] = size
    for inner in sorted(range(tensor.ndim), key=lambda place: (tensor.stride(place), -place)):
        strides[inner] = stride
        stride *= shape[inner]
    return tensor.as_strided(shape, strides)


def _place(written: tuple[Tensor, Tensor, CacheSlot]) -> tuple[Tensor, Tensor]:
    """Where in a buffer a step's tensor belongs, and that tensor. Behind a buffer's pending rows stays what was there,
    which nobody accepts."""
    buffer, new, slot = written
    axis = slot.pending_dim()
    return buffer if axis is None else buffer.narrow(axis, 0, new.shape[axis]), new


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first, unless it lies there: keys, values and states that were written in
    place are views of the buffers. Those of one dtype that lie alike in memory are one kernel."""
    together: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for buffer, new in pairs:
        if not new.numel() or _is_there(new, buffer):
            continue
        # along an axis of one element no stride is taken; one request's first rows lie together
        sizes = zip(new.shape, new.stride(), buffer.stride(), strict=True)
        buffer = buffer.as_strided(new.shape, [mine if size == 1 else own for size, mine, own in sizes])
        if new.dtype == buffer.dtype and new.stride() == buffer.stride() and _is_dense(new):
            together.setdefault(new.dtype, []).append((buffer, new))
        else:
            buffer.copy_(new)
    for alike in together.values():
        torch._foreach_copy_([buffer for buffer, _ in alike], [new for _, new in alike])


def _is_there(new: Tensor, buffer: Tensor) -> bool:
    """Whether both are the same elements of the same memory."""
    return new is buffer or (
        new.data_ptr() == buffer.data_ptr() and new.dtype == buffer.dtype and new.shape == buffer.shape
        and new.stride() == buffer.stride()
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements are all that lies between the first and the last of them."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return span + 1 == tensor.numel()
