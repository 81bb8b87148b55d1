"""One training step and the steps of decoding, simulated: their memory and their work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flarec.decode import BlockSpec, Cache, Stepper
from flarec.decode.engine import longest_piece
from flarec.device import resolve_compile, resolve_kernels
from flarec.errors import PassError
from flarec.ir.program import Program
from flarec.ir.slots import CacheSlot
from flarec.passes import lower
from flarec.passes.embed_mask import PARAMETER
from flarec.recipe import Recipe
from flarec.train.adapter import adapter_of
from flarec.train.data.packing import full_rows
from flarec.train.feed import Feed
from flarec.train.loop import Trainer
from flarec.train.mask_token import MaskToken
from flarec.train.objective.head_loss import head_rows_at_once

from .regions import counted_codes
from .report import Memory
from .simulate import Simulation, Work, with_fake_weights

HOST = torch.device("cpu")
"""Where simulations run, whatever they are of: nothing is allocated, and indices are computed without a GPU."""


@dataclass(frozen=True)
class Training:
    """Memory at the worst moment of an optimizer step, and the work of its two parts."""

    memory: Memory
    micro_batch: Work
    update: Work


@dataclass(frozen=True)
class Serving:
    """Memory at the worst moment of decoding, and the work of each kind of step by its name."""

    memory: Memory
    steps: dict[str, Work]


def training_program(captured: Program, recipe: Recipe, device: torch.device) -> Program:
    """What `flarec convert` trains on a device: with its kernels, where they run this model, and its regions."""
    adapter = adapter_of(recipe)
    options: dict[str, Any] = {"mask_vector": recipe.mask_choice == "vector", "adapter": adapter,
                               "regions": resolve_compile(recipe.train.compile, device)}
    try:
        return lower(captured, "train", kernels=resolve_kernels("auto", device), **options)
    except PassError:  # the kernels refuse a site: with torch's it is trained all the same
        return lower(captured, "train", **options)


def simulate_training(program: Program, recipe: Recipe, *, length: int, batch: int, device: torch.device) -> Training:
    """An optimizer step with `batch` rows of `length` tokens per forward pass; the trainer is that of `flarec convert`.

    program: lowered for training, on the meta device. The gradients of earlier micro batches are there already, and
    the optimizer has its moments. Raises `CaptureError` for a program whose shapes depend on computed numbers.
    """
    recipe = recipe.override([
        f"optimizer.batch_rows={batch}", f"optimizer.micro_rows={batch}", "train.shard=optimizer",  # of one rank
        f"data.max_length={length}", "diffusion.span_entropy=0",  # spans do not depend on numbers
    ])
    vector = PARAMETER in program.extra
    mask = MaskToken("vector", program.vocab_size) if vector else MaskToken("row", program.vocab_size - 1)
    if recipe.mask_choice == "random":
        mask = MaskToken("random", program.vocab_size, ((0, program.vocab_size),))
    rows = full_rows(length, batch)
    batches = Feed(program, recipe, mask, rows, 0, ahead=False).take(0).batches
    with Simulation() as simulation:
        program = with_fake_weights(program, simulation, HOST)
        trainer = Trainer(program, recipe, mask, rows, seed=0, codes=counted_codes(simulation))
        trainer.feed.head_rows = head_rows_at_once(program, device)
        masters = list(trainer.weights.masters.values())
        weights = simulation.live
        for master in masters:
            master.grad = torch.zeros_like(master)
        gradients = simulation.live - weights
        trainer.optimizer.step()
        moments = simulation.live - weights - gradients
        simulation.forget_peak()
        start = simulation.work.copy()
        trainer.accumulate(batches)
        middle = simulation.work.copy()
        torch.nn.utils.clip_grad_norm_(masters, recipe.optimizer.clip or math.inf)
        trainer.optimizer.step()
        trainer.weights.round()
        peak, end = simulation.peak, simulation.work.copy()
    parts = {"weights": weights, "gradients": gradients, "AdamW moments": moments}
    parts["activations"] = peak - sum(parts.values())
    return Training(Memory(parts), middle - start, end - middle)


def simulate_serving(
    program: Program, *, length: int, batch: int, block_size: int, device: torch.device
) -> Serving:
    """Decoding `batch` requests whose caches hold `length` positions: a prefill and the steps of the three modes.

    program: lowered for decoding, on the meta device, in the dtype that serves. Raises `CaptureError` as above.
    """
    steps: dict[str, Work] = {}
    chunk = min(longest_piece(device, batch), length - 1)
    with Simulation() as simulation, torch.no_grad():
        program, device = with_fake_weights(program, simulation, HOST), HOST
        weights = simulation.live
        cache = Cache.allocate(program.cache_slots, batch, length, device)
        cache.tensors = {name: _unknown(simulation, tensor) for name, tensor in cache.tensors.items()}
        caches = simulation.live - weights
        simulation.forget_peak()
        cache.length = torch.full((batch,), max(0, length - 1 - chunk - 4 * (block_size + 1)), device=device)
        stepper = Stepper(program, cache, BlockSpec(block_size, block_size, "causal", 0))
        drafts = block_size + 1
        for name, counts, anchors in (
            (f"prefill of {chunk} tokens", chunk, [chunk]),
            ("commit of the prefill", 1, []),
            ("causal", 1, []),
            ("AR-Trust", drafts, list(range(1, drafts + 1))),
            ("Diffusion-Trust", 0, [0]),
        ):
            start = simulation.work.copy()
            decode_step(stepper, counts, anchors)
            steps[name] = simulation.work - start
        del steps["commit of the prefill"]
        parts = {"weights": weights, "caches": caches, "working memory": simulation.peak - weights - caches}
    return Serving(Memory(parts), steps)


def _unknown(simulation: Simulation, tensor: torch.Tensor) -> torch.Tensor:
    """Small caches too must not be computed with."""
    if simulation.is_fake(tensor):
        return tensor
    with simulation.fake:
        return torch.empty_like(tensor)


def decode_step(stepper: Stepper, clean: int, anchors: Sequence[int]) -> None:
    """A step with `clean` rows per request and a block at each of `anchors`; one clean row is accepted."""
    assert stepper.blocks is not None
    requests = stepper.cache.batch
    heads = min(clean, 1) if clean > stepper.blocks.size + 1 else clean  # of a prefill only the last row decides
    plan = stepper.plan([clean] * requests, [anchors] * requests, [heads] * requests)
    length = plan.clean_length + plan.noisy_length
    stepper.run(plan, torch.zeros(requests, length, dtype=torch.int64, device=stepper.device))
    stepper.cache.accept(torch.full((requests,), min(clean, 1), device=stepper.device))


def cache_bytes(slots: Sequence[CacheSlot]) -> tuple[int, int]:
    """(bytes of a request whatever its length, bytes of each position that it can hold) of empty caches."""
    fixed = per_position = 0
    for slot in slots:
        size = slot.dtype.itemsize
        for axis in slot.shape:
            size *= axis if isinstance(axis, int) else 0 if axis == "pending" else 1
        if "capacity" in slot.shape:
            per_position += size
        else:
            fixed += size
    return fixed, per_position
