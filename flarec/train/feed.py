"""What an optimizer step reads, made ahead of it: packed rows with noise, layouts, schedules, the plan of the head.

On a GPU the next step's inputs are made on a thread while the device computes, and copied from pinned memory on a
stream of their own, so that neither side waits for the other; spans that the clean stream's entropy ends
(`span_entropy`) are laid when the step before is done. On a CPU a thread would take the cores of the step: there
they are made when they are asked for. Either way noise is a function of (seed, step), and `position` belongs to the
steps that were taken, not to those that were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import UsageError
from ..ir.program import Program
from ..recipe import Recipe
from .data.document import PackedRow
from .data.packing import RowStream
from .mask_token import MaskToken
from .objective.batch import Batch, build_batches
from .objective.entropy import next_token_entropies
from .objective.head_loss import plan_for
from .objective.head_plan import HeadPlan
from .objective.loss import Scales
from .objective.noise import step_generator
from .ranks.group import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass on the program's device; `plan` is None for a program whose head is in its graph."""

    batch: Batch
    derived: Mapping[str, Any]
    plan: HeadPlan | None
    scales: Scales


@dataclass(frozen=True)
class StepInput:
    """One optimizer step. position: of the row stream behind these rows; ready: after the copies, on a GPU."""

    rows: Sequence[PackedRow]
    batches: Sequence[Batch]
    micro_batches: Sequence[MicroBatch] | None
    position: dict[str, Any]
    ready: Any = None


def micro_rows_of(recipe: Recipe, ranks: int) -> int:
    """Rows of a forward pass, where each of the ranks has the same number of rows of a step.

    Raises `UsageError` if they cannot be split so.
    """
    rows, micro = recipe.optimizer.batch_rows, recipe.optimizer.micro_rows
    own, rest = divmod(rows, ranks)
    if rest:
        raise UsageError(
            f"optimizer.batch_rows = {rows} cannot be split over {ranks} ranks; choose a multiple of {ranks}"
        )
    if own % min(own, micro):
        raise UsageError(
            f"optimizer.batch_rows = {rows} over {ranks} ranks is {own} rows for each, which optimizer.micro_rows = "
            f"{micro} does not divide; choose another"
        )
    return min(own, micro)


class Feed:
    """Inputs of one step after the other. ahead: made on a thread, one step ahead; None: on a GPU.

    Every rank draws all rows and noise of a step, which do not depend on the ranks, and computes its share: rank `r`
    the `r`th part of the rows, in their order.
    """

    def __init__(
        self,
        program: Program,
        recipe: Recipe,
        mask: MaskToken,
        rows: RowStream,
        seed: int,
        ahead: bool | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks(str(program.device))
        self.program = program
        self.recipe = recipe
        self.mask = mask
        self.rows = rows
        self.seed = seed
        self.position = rows.state_dict()
        self.micro_rows = micro_rows_of(recipe, self.ranks.size)
        self.head_rows: int | None = None
        """Rows of logits at a time, instead of as many as suit the device."""
        self.next: tuple[int, Future[StepInput]] | None = None
        on_gpu = program.device.type == "cuda"
        if recipe.diffusion.span_entropy:
            ahead = False  # the spans of a step are laid by the weights before it
        self.stream = torch.cuda.Stream(program.device) if on_gpu else None
        threaded = on_gpu if ahead is None else ahead
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="flarec-feed") if threaded else None

    def take(self, step: int) -> StepInput:
        """The inputs of `step` (counted from 0). Raises what building them raised, `DataError` for one."""
        if self.thread is None:
            made = self._host(step)
        else:
            known, future = self.next or (step, self.thread.submit(self._moved, step))
            assert known == step, "steps are taken one after the other"
            self.next = None
            made = future.result()
            if step + 1 < self.recipe.optimizer.steps:
                self.next = step + 1, self.thread.submit(self._moved, step + 1)
            if self.stream is not None:
                stream = torch.cuda.current_stream(self.program.device)
                stream.wait_event(made.ready)
                for tensor in tensors_of(made.micro_batches):
                    tensor.record_stream(stream)
        self.position = made.position
        return made

    def seek(self, position: dict[str, Any]) -> None:
        """Continue from a saved position; what was made ahead is dropped. Raises `CheckpointError` for other data."""
        if self.next is not None:
            self.next[1].exception()  # waits for the thread, which reads the rows
            self.next = None
        self.rows.load_state_dict(position)
        self.position = position

    def _host(self, step: int) -> StepInput:
        options = self.recipe.optimizer
        rows, noisy = self.rows.rows(options.batch_rows), self.recipe.objective.diffusion_weight > 0
        diffusion, entropies = self.recipe.diffusion_at(step), None
        if noisy and diffusion.span_entropy:
            entropies = next_token_entropies(
                self.program, rows, diffusion, self.mask.token_id, micro_rows=self.micro_rows
            )
        batches = build_batches(
            rows, diffusion, self.mask.token_id, step_generator(self.seed, step), micro_rows=self.micro_rows,
            noisy=noisy, entropies=entropies, noise_ids=self.mask.ids,
        )
        return StepInput(rows, batches, None, self.rows.state_dict())

    def _moved(self, step: int) -> StepInput:
        made = self._host(step)
        with torch.cuda.stream(self.stream):  # None: no stream
            micro_batches = list(self.micro_batches(made.batches))
            ready = None if self.stream is None else self.stream.record_event()
        return replace(made, micro_batches=micro_batches, ready=ready)

    def micro_batches(self, batches: Sequence[Batch]) -> Iterator[MicroBatch]:
        """This rank's share of the forward passes of host batches that form one optimizer step, one by one."""
        device, scales = self.program.device, Scales.of(batches, self.recipe.objective)

        def move(value: T) -> T:
            return moved(value, device)

        for host in batches[self.ranks.share(len(batches))]:
            batch, plan = move(host), move(plan_for(self.program, host, scales, self.head_rows))
            yield MicroBatch(batch, self.program.derive(host.layout, moved=batch.layout, move=move), plan, scales)


def moved(value: T, device: torch.device) -> T:
    """Every tensor in a dataclass (nested ones too) on a device; copies to a GPU come from pinned memory and are not
    waited for, copies from one go to pinned memory: wait for an event before reading them."""

    def move(tensor: Tensor) -> Tensor:
        if device.type == tensor.device.type:
            return tensor
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    return mapped(value, move)


def mapped(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """The same dataclass, tuple or tensor with `function` of every tensor."""
    found: Any = value
    if isinstance(value, Tensor):
        found = function(value)
    elif isinstance(value, tuple):
        found = tuple(mapped(item, function) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: mapped(getattr(value, item.name), function) for item in fields(value) if item.init}
        found = replace(value, **parts)
    result: T = found
    return result


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in dataclasses, mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
