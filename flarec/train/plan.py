"""`flarec convert --dry-run`: what a run would do and needs. One step is measured in memory, nothing is written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..checkpoint.hub import check_push
from ..decode import Cache
from ..decode.engine import SLOTS
from ..device import memory_of, resident
from .answers.step import with_answers
from .mask_token import MaskToken
from .memory import Kept, watched
from .objective.batch import build_batches
from .objective.noise import step_generator
from .options import Options
from .plain_source import plain_source
from .prepare import Run, epochs_of, prepare
from .progress import Reporter
from .ranks.group import joined
from .trackers.tracking import chosen_trackers


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    parameters        trained parameters
    weight_bytes      of weights (trained ones with their float32 masters), gradients and moments
    activation_bytes  measured on one micro batch: what autograd keeps for the backward pass, of layers that are
                      computed again the largest one (CPU), or everything that was allocated above weights and gradients
                      (CUDA)
    step_seconds      one optimizer step, from the time of one micro batch and of the update
    process_bytes     on a CPU the most that this process had while a step was measured, or would have in an evaluation
    epochs            how often the run passes over each source, about
    """

    run: Run
    parameters: int
    weight_bytes: int
    activation_bytes: int
    step_seconds: float
    epochs: Sequence[float]
    process_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        return self.process_bytes or self.weight_bytes + self.activation_bytes

    def memory_text(self) -> str:
        """What is needed at most, of what, and whether the machine has it."""
        text = (
            f"{_size(self.memory_bytes)}: weights, gradients and moments {_size(self.weight_bytes)}, activations "
            f"{_size(self.activation_bytes)}"
        )
        if self.process_bytes:
            text += ", the rest Python and libraries (measured)"
        there = memory_of(self.run.trainer.program.device)
        if there is not None and there < self.memory_bytes:
            text += (
                f"; this machine has {_size(there)}, too little: set train.memory=recompute, or lower "
                "optimizer.micro_rows or --max-length"
            )
        return text

    def _split(self) -> str:
        size = self.run.trainer.ranks.size
        return "" if size == 1 else f" on each of {size} ranks; memory is that of rank 0"

    def _output(self) -> str:
        options = self.run.options
        if options.adapter_only:
            return f"{options.output}: the adapter alone, which opens with {options.source}"
        return f"{options.output}" + (": the adapter, and links to the source's weight files" if options.link else "")

    def text(self) -> str:
        """For people; sizes in GB = 10^9 bytes or MB = 10^6 bytes."""
        run, recipe = self.run, self.run.recipe
        optimizer = recipe.optimizer
        lines = [
            f"source       {run.options.source} ({run.captured.family}), {run.model.num_parameters():,} parameters",
            f"trained      {self.parameters:,} parameters",
            f"output       {self._output()}",
            *([f"pushed       to {push} once it is complete"] if (push := run.options.push_to_hub) is not None else []),
            *(
                f"data         {source.stats}, weight {source.weight:g}, about {epochs:.2f} epochs"
                for source, epochs in zip(run.sources, self.epochs, strict=True)
            ),
            f"held out     {run.held_documents} documents",
            f"mask token   {_mask_text(run.mask)}",
            f"rows         {optimizer.batch_rows} of {recipe.data.max_length} tokens per step, "
            f"{run.trainer.feed.micro_rows} at a time{self._split()}",
            f"steps        {optimizer.steps:,}",
            f"device       {run.trainer.program.device}, kernels {run.options.kernels}, precision {run.precision}",
            f"memory       {self.memory_text()}",
            f"             {run.memory.text.removeprefix('memory: ')}",
            f"time         {_duration(self.step_seconds * optimizer.steps)}: {self.step_seconds:.2f} s per step, "
            "evaluations and saves not counted",
            "",
            *(f"pipeline {name}\n{_indent(text)}" for name, text in run.pipelines.items()),
            "",
            "recipe",
            _indent(recipe.to_toml().strip()),
        ]
        return "\n".join(lines)


def _mask_text(mask: MaskToken) -> str:
    drawn = sum(end - first for first, end in mask.ids)
    return f"{mask.kind}, " + (f"of {drawn:,} ids" if drawn else f"id {mask.token_id}")


def plan(options: Options, reporter: Reporter) -> Plan | None:
    """Prepare the run, measure one step in memory and return what was found; of several ranks on the first one."""
    if options.push_to_hub is not None:
        check_push(options.push_to_hub)  # nothing is pushed; a run would be refused
    chosen_trackers(options.report_to)
    with joined(options.device) as ranks:
        reporter = reporter if ranks.first else Reporter()
        with plain_source(options, reporter) as opened:
            run = prepare(with_answers(opened, reporter, write=False), reporter, ranks)
            found = _measured(run, reporter)
        return found if ranks.first else None


def _measured(run: Run, reporter: Reporter) -> Plan:
    recipe, trainer = run.recipe, run.trainer
    reporter.note("measuring one step")
    position = trainer.rows.state_dict()
    rows = trainer.rows.rows(recipe.optimizer.batch_rows)
    trainer.rows.load_state_dict(position)
    batches = build_batches(
        rows, recipe.diffusion, run.mask.token_id, step_generator(run.options.seed, 0),
        micro_rows=trainer.feed.micro_rows, noise_ids=run.mask.ids,
    )
    share, device = trainer.ranks.size, trainer.program.device
    activations = _activation_bytes(run, lambda: trainer.accumulate(batches[:share]))
    update = _seconds_of(device, lambda: _update(run))
    kept, _ = resident()
    # once more, now that gradients and moments are there: the most that a step has at a time
    micro = _seconds_of(device, lambda: trainer.accumulate(batches[:share]))
    seconds = update + micro * -(-len(batches) // share)
    process = max(resident()[1], kept + _evaluation_bytes(run)) if device.type == "cpu" else 0
    count = sum(parameter.numel() for parameter in trainer.parameters.values())
    return Plan(run, count, trainer.weight_bytes, activations, seconds, epochs_of(trainer.rows, recipe), process)


def _update(run: Run) -> None:
    """The second part of an optimizer step; the run itself is not started, so its weights may change."""
    run.trainer.weights.clip(run.recipe.optimizer.clip or math.inf)
    run.trainer.optimizer.step()
    run.trainer.weights.round()


def _seconds_of(device: torch.device, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _evaluation_bytes(run: Run) -> int:
    """Of the caches that an evaluation among the steps has."""
    held = run.held_out
    if held is None or not run.recipe.evaluation.every:
        return 0
    longest = max(len(document) for document in held.documents) + run.recipe.evaluation.max_new_tokens
    requests = min(SLOTS, len(held.documents))
    cache = Cache.allocate(held.decode.cache_slots, requests, longest, torch.device("meta"))
    return sum(tensor.nbytes for tensor in cache.tensors.values())


def _activation_bytes(run: Run, step: Callable[[], object]) -> int:
    """What a forward and backward pass needs beside weights and gradients."""
    device = run.trainer.program.device
    if device.type == "cuda":
        step()  # allocates the gradients, and what the first use of a kernel allocates
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    program = run.trainer.program
    with watched(program) as layers, Kept(program) as kept:
        step()
    return kept.bytes + max(layers, default=0)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds % 60:.0f} s"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" if line else "" for line in text.splitlines())
