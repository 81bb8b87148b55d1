"""What a training step keeps (`train.memory`), decided once before the first step, from the memory that is free.

One row is run as it would be with its layers computed again, and each layer is looked at on the way: from what it keeps
follows what any number of rows needs, kept or computed again. Models that are far from the limit are not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, Literal, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from ..device import free_memory
from ..errors import UsageError
from ..ir.partition import PartitionedCodes
from ..ir.program import Program, layer_of
from ..passes.outline_regions import OUTLINED
from ..recipe import Recipe
from .adapter import choose_trained
from .data.packing import full_rows
from .feed import Feed, micro_rows_of
from .gathering import OPTIMIZER, PARAMETERS, largest_pair, layers_of
from .mask_token import MaskToken
from .moments import moment_bytes, names_in_codes
from .objective.head_loss import head_rows_at_once, losses_of
from .recompute import Recomputed, recomputed

KEEP: Final = "keep"
RECOMPUTE: Final = "recompute"
USED = 0.9
"""Of the free memory; the rest is for what is not counted: fragments, an evaluation, other processes."""
FAR = 0.5
"""Where a step cannot need more than this part of the free memory, nothing is measured."""
VECTORS, SCORES = 200, 4
"""More than a layer keeps of a token: hidden vectors, and numbers per head and token that it may attend to."""


@dataclass(frozen=True)
class MemoryChoice:
    """How steps are computed: recompute, micro_rows, and one line that says so. enough: False if nothing fits. cut:
    whether the parameters are cut over the ranks."""

    recompute: bool
    micro_rows: int
    text: str
    enough: bool = True
    cut: bool = False

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with the choice in it, for the trainer; that of the run stays what the user gave."""
        optimizer = replace(recipe.optimizer, micro_rows=self.micro_rows)
        memory: Literal["keep", "recompute"] = RECOMPUTE if self.recompute else KEEP
        train = replace(recipe.train, memory=memory, shard=PARAMETERS if self.cut else OPTIMIZER)
        return replace(recipe, optimizer=optimizer, train=train)


@dataclass(frozen=True)
class RowNeeds:
    """Bytes of a row beside weights, gradients and moments.

    kept, again  at most, with everything kept and with layers computed again, without what the head takes
    between      what is there, with layers computed again, when the losses are made
    head         what making the losses of one row takes in addition
    head_rows    as many rows take no more than what one chunk of logits does
    """

    kept: int
    again: int
    between: int = 0
    head: int = 0
    head_rows: int = 1

    def of(self, rows: int, *, recompute: bool) -> int:
        """Of so many rows at a time."""
        layers = 0 if recompute else self.kept - self.again
        head = rows * (self.between + layers) + min(rows, self.head_rows) * self.head
        return max(rows * (self.again if recompute else self.kept), head)


def as_given(recipe: Recipe, ranks: int, rows: int | None = None) -> MemoryChoice:
    """What a recipe says, with `auto` as keep: for one that says it, and where no step is taken. rows: instead of those
    of the recipe."""
    memory, most = recipe.train.memory, micro_rows_of(recipe, ranks) if rows is None else rows
    what = "layers are computed again" if memory == "recompute" else "everything is kept"
    text = f"memory: {what}, {_rows(most)} at a time (train.memory = {memory})"
    return MemoryChoice(memory == "recompute", most, text)


def choose(
    program: Program, recipe: Recipe, mask: MaskToken, ranks: int, *, rows: int | None = None, free: int | None = None
) -> MemoryChoice:
    """What `train.memory` means for this program, with its weights on the device of the run.

    rows: micro rows that are fixed, because the run began with them. free: bytes, instead of those that are free now.
    """
    free = free_memory(program.device) if free is None else free
    cut = cuts_parameters(program, recipe, ranks, free)
    return replace(_chosen(program, recipe, mask, ranks, rows, free, cut), cut=cut)


def cuts_parameters(program: Program, recipe: Recipe, ranks: int, free: int | None) -> bool:
    """What `train.shard` means: whether the parameters are cut over the ranks; one alone has nobody to share with."""
    if ranks == 1 or recipe.train.shard == OPTIMIZER or program.quantized:  # codes are small, and not cut
        return False
    return recipe.train.shard == PARAMETERS or (
        free is not None and state_bytes(program, recipe, ranks) > FAR * free
    )


def _chosen(
    program: Program, recipe: Recipe, mask: MaskToken, ranks: int, rows: int | None, free: int | None, cut: bool
) -> MemoryChoice:
    if recipe.train.memory != "auto":
        return as_given(recipe, ranks, rows)
    fixed, most = rows is not None, micro_rows_of(recipe, ranks) if rows is None else rows
    if free is None:
        text = f"memory: everything is kept, {_rows(most)} at a time (nothing says how much is free)"
        return MemoryChoice(False, most, text)
    state = state_bytes(program, recipe, ranks, cut=cut)
    if state + most * _bound(program, recipe, mask) < FAR * free:
        text = f"memory: everything is kept, {_rows(most)} at a time; that is far from the {_size(free)} that are free"
        return MemoryChoice(False, most, text)
    try:
        needs = measure_row(program, recipe, mask)
    except UsageError as error:  # layers that cannot be computed again
        return MemoryChoice(False, most, f"memory: everything is kept, {_rows(most)} at a time: {error}")
    except torch.OutOfMemoryError:
        text = f"memory: not even one row fits into the {_size(free)} that are free; lower data.max_length"
        return MemoryChoice(True, most if fixed else 1, text, enough=False)
    return decide(needs, state, free, [most] if fixed else [n for n in range(most, 0, -1) if most % n == 0])


def decide(needs: RowNeeds, state: int, free: int, rows: list[int]) -> MemoryChoice:
    """Keeping with the most of `rows` (falling) that fits, else computing again with the most that fits.

    Fewer rows at a time cost less time than computing layers again: on an H200 1 row instead of 4 takes 1.16 times
    (`benchmarks/results/train-h200.json`). state: bytes of masters, gradients and moments, which are not there yet.
    """
    room = int(USED * free) - state
    most, there = rows[0], f"of {_size(free)} that are free"
    kept, again = ({n: needs.of(n, recompute=recompute) for n in rows} for recompute in (False, True))
    whole = f"{_size(state + kept[most])} for {_rows(most)}"
    for count in rows:
        if kept[count] <= room:
            more = "" if count == most else f"; optimizer.micro_rows = {most} would need {whole}"
            needed = _size(state + kept[count])
            text = f"memory: everything is kept, {_rows(count)} at a time: {needed} {there}{more}"
            return MemoryChoice(False, count, text)
    for count in rows:
        if again[count] <= room:
            needed, one = _size(state + again[count]), _size(state + kept[rows[-1]])
            text = (
                f"memory: layers are computed again, {_rows(count)} at a time: {needed} {there}; keeping everything "
                f"would need {one} for {_rows(rows[-1])}"
            )
            return MemoryChoice(True, count, text)
    text = (
        f"memory: {_size(state + again[rows[-1]])} are needed for {_rows(rows[-1])}, layers computed again, and "
        f"only {_size(free)} are free; lower data.max_length, or take an adapter recipe"
    )
    return MemoryChoice(True, rows[-1], text, enough=False)


def measure_row(program: Program, recipe: Recipe, mask: MaskToken) -> RowNeeds:
    """Run one full row forward and backward, layers computed again, and look at what each of them keeps. Regions that
    will be compiled keep what they keep then, and are not compiled for it.

    The parameters have no gradient behind it. Raises `torch.OutOfMemoryError` if that does not fit.
    """
    trained = choose_trained(program, recipe)
    codes = PartitionedCodes() if OUTLINED in program.properties else None
    run, feed = recomputed(program, codes), _feed(program, recipe, mask)
    micro = next(iter(feed.micro_batches(feed.take(0).batches)))
    batch, meter = micro.batch, _Meter(program.device)
    hooks = [value.register_post_accumulate_grad_hook(_forget) for value in trained.values()]
    try:
        with watched(run) as layers, Kept(program) as outside:
            results = run.results(
                batch.input_ids, layout=batch.layout, head_rows=batch.head_rows, derived=micro.derived
            )
            body, between = meter.peak(), meter.now()
            loss = losses_of(results[0], run, batch, micro.plan, micro.scales, suppress=mask.suppress).total
        head = meter.peak() - between
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    largest = max(layers, default=0)
    # where the device does not tell: what autograd keeps, a layer, and the gradients of one
    again = max(body, meter.peak()) if meter.tells else outside.bytes + 2 * largest
    many = -(-head_rows_at_once(program) // max(1, len(batch.head_rows)))
    return RowNeeds(again + sum(layers) - largest, again, between, head, many)


def _forget(parameter: Tensor) -> None:
    """Gradients are counted with the masters, to which they are added one by one."""
    parameter.grad = None


class _Meter:
    """Bytes that are allocated on a GPU beside what was when it was made; 0 elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.tells = device.type == "cuda"
        self.device, self.start = device, 0
        if self.tells:
            torch.cuda.synchronize(device)
            self.start = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device) - self.start if self.tells else 0

    def peak(self) -> int:
        """At most since the last call."""
        if not self.tells:
            return 0
        found = torch.cuda.max_memory_allocated(self.device) - self.start
        torch.cuda.reset_peak_memory_stats(self.device)
        return found


class Kept:
    """Within the context: bytes that autograd keeps beside the program's parameters and the codes of some; a storage
    counts once."""

    def __init__(self, program: Program) -> None:
        codes = [value for held in program.quantized.values() for value in held.parts.values()]
        self.weights = {value.untyped_storage()._cdata for value in (*program.parameters().values(), *codes)}
        self.storages: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):  # of a compiler's trace
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:  # their memory may come and go
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@contextmanager
def watched(run: Program) -> Iterator[list[int]]:
    """Within the context: what each layer of a program whose layers are computed again would keep, in bytes. A layer
    runs once more for it."""
    layers = [module for module in getattr(run.run, "modules", list)() if isinstance(module, Recomputed)]
    found: list[int] = []

    def look(unit: torch.nn.Module, values: tuple[object, ...]) -> None:
        if torch.is_grad_enabled():
            with Kept(run) as kept:
                results = unit(*values)
            given = {value.untyped_storage().data_ptr() for value in values if isinstance(value, Tensor)}
            found.append(sum(size for place, size in kept.storages.items() if place not in given))
            del results

    for layer in layers:
        layer.look = look
    try:
        yield found
    finally:
        for layer in layers:
            layer.look = None


def state_bytes(program: Program, recipe: Recipe, ranks: int, *, cut: bool = False) -> int:
    """Of masters, gradients and moments of one rank, which come to the program's weights. cut: less what becomes free
    of these, where they are cut over the ranks; that may be more."""
    total, trained = 0, choose_trained(program, recipe)
    in_codes = names_in_codes(recipe, trained)
    for name, parameter in trained.items():
        dtype = torch.float32 if parameter.dtype.itemsize == 2 else parameter.dtype
        copies = 2 if parameter.dtype.itemsize == 2 else 1
        total += copies * dtype.itemsize * parameter.numel() + moment_bytes(parameter.numel(), dtype, name in in_codes)
    if not cut:
        return total // ranks
    every, layers = program.parameters(), dict[int, dict[str, Tensor]]()
    for name, layer in layers_of(program).items():
        layers.setdefault(layer, {})[name] = every[name]
    named = {name: value for values in layers.values() for name, value in values.items()}
    frozen = sum(value.nbytes for name, value in named.items() if name not in trained)
    return (total + frozen) // ranks - sum(value.nbytes for value in named.values()) + largest_pair(layers)


def _bound(program: Program, recipe: Recipe, mask: MaskToken) -> int:
    """More bytes than a row needs."""
    feed = _feed(program, recipe, mask)
    length = feed.take(0).batches[0].layout.length
    config = program.config.get_text_config()
    layers = len({layer_of(node) for node in program.graph.nodes} - {None})
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    each = VECTORS * int(config.hidden_size) + SCORES * heads * length
    return int(length * layers * each * program.dtype.itemsize)


def _feed(program: Program, recipe: Recipe, mask: MaskToken) -> Feed:
    """Steps of one full row."""
    one = replace(recipe, optimizer=replace(recipe.optimizer, batch_rows=1, micro_rows=1))
    return Feed(program, one, mask, full_rows(recipe.data.max_length, 1), 0, ahead=False)


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
