"""What is verified, and how a comparison becomes a result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flarec.base.generation import Mode
from flarec.checkpoint.directory import Checkpoint, open_checkpoint
from flarec.checkpoint.lowered import lowered_elastic, pipeline_of
from flarec.checkpoint.manifest import Manifest
from flarec.decode.horizon import HorizonProgram
from flarec.device import resolve_kernels, torch_device
from flarec.errors import CheckpointError
from flarec.frontend.export import capture
from flarec.ir.pipeline import Pass
from flarec.ir.program import Program
from flarec.passes import AdaptNoisyStream, NarrowAdapter, lower
from flarec.passes.embed_mask import PARAMETER
from flarec.passes.plugins import load_plugins

from .texts import Texts
from .witness import Witness

ROUNDING_STEPS = 1000
"""Differences up to this many rounding steps of the largest compared number count as rounding, ..."""
OWN_ERRORS = 8
"""... and up to this many times what the model's own float32 is off on that text: large hidden states cancel."""
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
    noise_ids       ranges of the ids that masked positions show at random in decoding, if that is its noise
    readouts        of the checkpoint's blocks; suppress: ids that are never generated
    adapted         of a checkpoint with an adapter: what its checks look at
    texts           to take tokens from; None: random ids
    rechecked       modes whose tokens a recheck takes back, and their readouts; elastic: what runs elastic decoding
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
    texts: Texts | None = None
    noise_ids: tuple[tuple[int, int], ...] = ()
    rechecked: Mapping[Mode, str] = field(default_factory=dict)
    elastic: HorizonProgram | None = None

    @property
    def vocab_size(self) -> int:
        return self.train.vocab_size

    @cached_property
    def witness(self) -> Witness:
        """The source in float64; asked for by checks that compare numbers of one text."""
        return Witness(self.source)

    def slack(self, tokens: Sequence[int]) -> float:
        """What multiplies the bound of numbers that float32 computes from a text: 1 where the model's own error is no
        more than rounding at its logits. In float64 there is nothing to allow for."""
        if self.source is None or self.train.dtype != torch.float32:
            return 1.0
        seen = self.witness.see(tokens)
        rounding = ROUNDING_STEPS * torch.finfo(torch.float32).eps * seen.largest
        return max(1.0, OWN_ERRORS * seen.error / rounding) if rounding else 1.0

    def shown(self, tokens: Sequence[int]) -> str:
        """Tokens for people: their text where they are some, else their ids."""
        return self.texts.shown(list(tokens)) if self.texts is not None else f"of the ids {list(tokens)}"


@dataclass(frozen=True)
class Result:
    """One invariant: what was compared, and the largest difference with its bound (largest in units of the bound).
    counts: what a note says in words, as numbers."""

    invariant: int
    title: str
    compared: str
    difference: float
    bound: float
    passed: bool
    notes: tuple[str, ...] = field(default=())
    counts: Mapping[str, float] = field(default_factory=dict)


class Comparison:
    """Collects differences; keeps the one that is largest in units of its bound."""

    def __init__(self) -> None:
        self.difference, self.bound, self.worst = 0.0, 0.0, -1.0
        self.note: str | None = None

    def add(
        self, a: Tensor, b: Tensor, *, slack: float = 1.0, where: Callable[[int, float], str] | None = None
    ) -> None:
        """Compare two tensors of one shape. The bound is `ROUNDING_STEPS` rounding steps at the size of `a`.

        slack: multiplies the bound (`Subject.slack`). where: says what the place of a failure is, from the row (first
        dimension) and the size of the difference.
        """
        assert a.shape == b.shape, (a.shape, b.shape)
        if not a.numel():
            return
        distance = (a - b).detach().abs()
        difference = float(distance.max())
        dtype = torch.float64 if a.dtype == b.dtype == torch.float64 else torch.float32
        bound = slack * ROUNDING_STEPS * torch.finfo(dtype).eps * float(a.detach().abs().max())
        ratio = difference / bound if bound else float(difference > 0)
        ratio = math.inf if math.isnan(ratio) else ratio
        if ratio > self.worst:
            self.difference, self.bound, self.worst = difference, bound, ratio
            self.note = None
            if where is not None and not difference <= bound:
                self.note = where(int(distance.flatten(1).amax(1).argmax()), difference)

    def result(self, invariant: int, title: str, compared: str) -> Result:
        assert self.worst >= 0, "nothing was compared"
        notes = (self.note,) if self.note else ()
        return Result(invariant, title, compared, self.difference, self.bound, self.difference <= self.bound, notes)


def open_subject(
    path: str | Path,
    *,
    kernels: str = "auto",
    seed: int = 0,
    passes: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    adapter: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    debug: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Subject:
    """Open a checkpoint or model, capture it and lower both programs.

    dtype, device: of the run; debug: check every pass. say: called with a line before each slow part.
    Raises `CheckpointError` for a directory that is damaged or holds no model.
    """
    load_plugins(plugins)
    checkpoint = open_checkpoint(path, adapter=adapter)
    if checkpoint.manifest is not None and not checkpoint.foreign:
        checkpoint.manifest.check_files(checkpoint.home, whole=True)
    manifest = checkpoint.manifest
    say(f"opening {checkpoint.path}")
    place = torch_device(device)
    source = checkpoint.load_model(dtype, place)
    source.set_attn_implementation("eager")  # the definition: gemma2's default in transformers 5.17 drops its softcap
    say("capturing, or taking the graph from the program cache")
    program = capture(source, cache=True)
    program.extra.update(checkpoint.load_extra(dtype, place))
    kernels = resolve_kernels(kernels, place)
    vector = manifest is not None and manifest.mask.kind == "vector"
    if vector and PARAMETER not in program.extra:
        raise CheckpointError(f"{checkpoint.path} has no mask vector ({PARAMETER}); copy the checkpoint again")
    steps = {
        target: pipeline_of(manifest, target, kernels=kernels, foreign=passes, plugins=plugins)
        for target in ("train", "decode")
    }
    # training leaves out the gradients of the clean stream over a frozen model, which invariants 2 and 7 look at
    steps["train"] = [step for step in steps["train"] if step.name != "split-streams"]
    say("lowering, with a check behind every pass" if debug else "lowering")
    train, decode = (lower(program, target, steps=chosen, debug=debug) for target, chosen in steps.items())
    texts = _texts_of(checkpoint, program.vocab_size, say)
    if manifest is None:
        return Subject(train, decode, source, mask_token_id=0, seed=seed, texts=texts)
    return Subject(
        train,
        decode,
        source,
        mask_token_id=manifest.mask.ids[0][0] if manifest.mask.ids else manifest.mask.token_id,
        block_size=manifest.decode.block_size,
        readouts=tuple(dict.fromkeys(manifest.decode.readouts.values())) or READOUTS,
        suppress=() if manifest.mask.suppress is None else (manifest.mask.suppress,),
        noise_ids=manifest.mask.ids,
        seed=seed,
        texts=texts,
        adapted=_without_adapter(checkpoint, program, steps) if checkpoint.adapter is not None else None,
        **_rechecked(checkpoint, manifest, program, {"kernels": kernels, "foreign": passes, "plugins": plugins}),
    )


def _rechecked(checkpoint: Checkpoint, manifest: Manifest, program: Program, how: dict[str, Any]) -> dict[str, Any]:
    """Fields of a subject: its modes with a recheck, and what they need."""
    readouts = {} if manifest.mask.ids else manifest.decode.readouts  # random ids are refused by Diffusion-Trust
    modes: dict[Mode, str] = {}
    if "diffusion-trust" in readouts:
        modes["diffusion-trust"] = readouts["diffusion-trust"]
    if not checkpoint.has_horizon:
        return {"rechecked": modes}
    elastic = HorizonProgram(lowered_elastic(checkpoint, program, **how))
    modes["elastic"] = "causal"
    return {"rechecked": modes, "elastic": elastic}


def _texts_of(checkpoint: Checkpoint, vocabulary: int, say: Callable[[str], None]) -> Texts | None:
    if not checkpoint.has_tokenizer:
        say("there is no tokenizer: texts are random ids")
        return None
    texts = Texts.of(checkpoint.load_tokenizer(), vocabulary)
    if texts is None:
        say("the tokenizer gives ids that the model does not have: texts are random ids")
    return texts


def _without_adapter(checkpoint: Checkpoint, program: Program, steps: Mapping[str, list[Pass]]) -> Adapted:
    adapters = (AdaptNoisyStream, NarrowAdapter)
    own = {name: [step for step in chosen if not isinstance(step, adapters)] for name, chosen in steps.items()}
    return Adapted(checkpoint, *(lower(program, target, steps=own[target]) for target in ("train", "decode")))
