"""What is verified, and how a comparison becomes a result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flarec.checkpoint.directory import Checkpoint, open_checkpoint
from flarec.checkpoint.lowered import pipeline_of
from flarec.errors import CheckpointError
from flarec.frontend.export import capture
from flarec.ir.pipeline import Pass
from flarec.ir.program import Program
from flarec.passes import AdaptNoisyStream, lower
from flarec.passes.embed_mask import PARAMETER
from flarec.passes.plugins import load_plugins

ROUNDING_STEPS = 1000
"""Differences up to this many rounding steps of the largest compared number count as rounding."""
DEFAULT_BLOCK = 4
READOUTS = ("block_end", "causal")


@dataclass(frozen=True)
class Adapted:
    """The same model without its adapter: programs that share all other parameters with those of the subject."""

    checkpoint: Checkpoint
    train: Program
    decode: Program


@dataclass(frozen=True)
class Subject:
    """The lowered programs, how they decode, and the model in plain transformers as an independent witness.

    train, decode   lowered programs that share their parameters
    source          the model in plain transformers, None where invariants 1 and 6 are not asked for
    mask_token_id   input id of masked positions; for a model that was not converted any id serves
    readouts        of the checkpoint's blocks; suppress: ids that are never generated
    adapted         of a checkpoint with an adapter: what its checks look at
    """

    train: Program
    decode: Program
    source: Any
    mask_token_id: int
    block_size: int = DEFAULT_BLOCK
    readouts: tuple[str, ...] = READOUTS
    suppress: tuple[int, ...] = ()
    seed: int = 0
    adapted: Adapted | None = None

    @property
    def vocab_size(self) -> int:
        return self.train.vocab_size


@dataclass(frozen=True)
class Result:
    """One invariant: what was compared, and the largest difference with its bound (largest in units of the bound)."""

    invariant: int
    title: str
    compared: str
    difference: float
    bound: float
    passed: bool
    notes: tuple[str, ...] = field(default=())


class Comparison:
    """Collects differences; keeps the one that is largest in units of its bound."""

    def __init__(self) -> None:
        self.difference, self.bound, self.worst = 0.0, 0.0, -1.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Compare two tensors of one shape. The bound is `ROUNDING_STEPS` rounding steps at the size of `a`."""
        assert a.shape == b.shape, (a.shape, b.shape)
        if not a.numel():
            return
        difference = float((a - b).detach().abs().max())
        dtype = torch.float64 if a.dtype == b.dtype == torch.float64 else torch.float32
        bound = ROUNDING_STEPS * torch.finfo(dtype).eps * float(a.detach().abs().max())
        ratio = difference / bound if bound else float(difference > 0)
        ratio = math.inf if math.isnan(ratio) else ratio
        if ratio > self.worst:
            self.difference, self.bound, self.worst = difference, bound, ratio

    def result(self, invariant: int, title: str, compared: str) -> Result:
        assert self.worst >= 0, "nothing was compared"
        return Result(invariant, title, compared, self.difference, self.bound, self.difference <= self.bound)


def open_subject(
    path: str | Path,
    *,
    kernels: str = "torch",
    seed: int = 0,
    passes: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    adapter: str | Path | None = None,
) -> Subject:
    """Open a checkpoint or model in float32 on the CPU, capture it and lower both programs, checking every pass.

    Raises `CheckpointError` for a directory that is damaged or holds no model.
    """
    load_plugins(plugins)
    checkpoint = open_checkpoint(path, adapter=adapter)
    if checkpoint.manifest is not None and not checkpoint.foreign:
        checkpoint.manifest.check_files(checkpoint.home, whole=True)
    manifest = checkpoint.manifest
    source = checkpoint.load_model(torch.float32)
    source.set_attn_implementation("eager")  # the definition: gemma2's default in transformers 5.17 drops its softcap
    program = capture(source)
    program.extra.update(checkpoint.load_extra(torch.float32))
    vector = manifest is not None and manifest.mask.kind == "vector"
    if vector and PARAMETER not in program.extra:
        raise CheckpointError(f"{checkpoint.path} has no mask vector ({PARAMETER}); copy the checkpoint again")
    steps = {
        target: pipeline_of(manifest, target, kernels=kernels, foreign=passes, plugins=plugins)
        for target in ("train", "decode")
    }
    # training leaves out the gradients of the clean stream over a frozen model, which invariants 2 and 7 look at
    steps["train"] = [step for step in steps["train"] if step.name != "split-streams"]
    train, decode = (lower(program, target, steps=chosen, debug=True) for target, chosen in steps.items())
    if manifest is None:
        return Subject(train, decode, source, mask_token_id=0, seed=seed)
    return Subject(
        train,
        decode,
        source,
        mask_token_id=manifest.mask.token_id,
        block_size=manifest.decode.block_size,
        readouts=tuple(dict.fromkeys(manifest.decode.readouts.values())) or READOUTS,
        suppress=() if vector else (manifest.mask.token_id,),
        seed=seed,
        adapted=_without_adapter(checkpoint, program, steps) if checkpoint.adapter is not None else None,
    )


def _without_adapter(checkpoint: Checkpoint, program: Program, steps: Mapping[str, list[Pass]]) -> Adapted:
    own = {target: [step for step in chosen if step.name != AdaptNoisyStream.name] for target, chosen in steps.items()}
    return Adapted(checkpoint, *(lower(program, target, steps=own[target]) for target in ("train", "decode")))
