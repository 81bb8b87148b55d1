"""The road of a family, stage by stage, on its small model: each stage uses what the earlier ones made.

A stage is a function that returns what it measured and raises if the family does not get through it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flarec import api
from flarec.base.generation import HEADLESS
from flarec.checkpoint.directory import describe_source
from flarec.checkpoint.manifest import DecodeDefaults, Manifest
from flarec.checkpoint.write import write_checkpoint
from flarec.errors import FlarecError
from flarec.frontend import families as adapters
from flarec.frontend import tiny, trust
from flarec.frontend.export import capture
from flarec.inspect import as_text, open_program, summarize
from flarec.inspect.lines import Recorder
from flarec.inspect.summary import mixer_kind
from flarec.ir.pipeline import pipeline_text, run_pipeline
from flarec.ir.program import Program
from flarec.passes import pipeline
from flarec.passes.properties import CHECKS
from flarec.train.loop import Trainer
from flarec.train.mask_token import MaskToken, choose_mask_token, initialise_mask_token
from flarec.verify import verify

from . import inputs
from .record import Outcome, Trial

TARGETS = ("train", "decode")
EAGER = "eager"
"""Attention of the transformers models: the definition. gemma2's default in transformers 5.17 drops its softcap."""
NEW_TOKENS = 20
LOGIT_TOLERANCE = 1e-4
"""Of the largest logit: float32 rounding through a few layers, measured 1e-7 to 1e-5."""
GRADIENT_TOLERANCE = 1e-3
"""Of a parameter's gradient norm."""
LOSS_FALL = 0.9
"""What ten steps must leave of a loss, at most."""


class StageError(FlarecError):
    """A stage ran through, and its result is wrong."""


@dataclass
class Road:
    """What the stages of one family have made so far; `folder` is a place for files."""

    family: str
    folder: Path
    tokenizer: Any = None
    model: Any = None
    captured: Program | None = None
    mask: MaskToken | None = None
    lowered: dict[str, Program] = field(default_factory=dict)
    opened: api.Model | None = None
    causal: dict[float, list[list[int]]] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "converted"


def names() -> list[str]:
    """All families that are tried: every row of the adapter table, then the plain softmax models."""
    return [*adapters.FAMILIES, *adapters.PLAIN]


def is_hybrid(family: str) -> bool:
    return family in adapters.FAMILIES


def _capture(road: Road) -> str:
    """The program equals the eager model, forward and gradients, at another batch and length than was traced."""
    road.model = tiny.build_tiny(road.family)
    road.model.set_attn_implementation(EAGER)
    road.captured = program = capture(road.model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, inputs.TOKENS, (3, 21), generator=generator)
    positions = torch.arange(ids.shape[1]).expand(ids.shape).contiguous()
    eager = road.model(input_ids=ids, position_ids=positions, use_cache=False).logits
    ours = program(ids, position_ids=positions)
    difference = _relative(ours, eager)
    if not difference <= LOGIT_TOLERANCE:
        raise StageError(f"the captured logits differ from the model's by {difference:.1e} of the largest")
    weight = torch.randn(eager.shape, generator=generator)
    parameters = dict(road.model.named_parameters())
    expected, got = (
        torch.autograd.grad((logits * weight).mean(), list(parameters.values()), allow_unused=True)
        for logits in (eager, ours)
    )
    worst = 0.0
    for name, a, b in zip(parameters, expected, got, strict=True):
        norm = 0.0 if a is None else float(a.norm())
        error = (torch.zeros(()) if a is None else a) - (torch.zeros(()) if b is None else b)
        relative = float(error.norm()) / (norm + 1e-6)
        if not relative <= GRADIENT_TOLERANCE:
            raise StageError(f"the gradient of {name} differs from the model's by {relative:.1e} of its norm")
        worst = max(worst, relative)
    return f"logits within {difference:.0e}, gradients within {worst:.0e}"


def _passes(road: Road) -> str:
    """Both pipelines, all property checkers after every pass."""
    assert road.captured is not None
    road.tokenizer = inputs.tokenizer()
    road.mask = choose_mask_token("auto", road.model.config, road.tokenizer)
    initialise_mask_token(road.mask, road.model, road.captured, road.tokenizer)
    for target in TARGETS:
        steps = pipeline(target, mask_vector=road.mask.kind == "vector")
        road.lowered[target] = run_pipeline(road.captured, steps, CHECKS, debug=True)
    sites = [sum(len(record.sites) for record in program.history) for program in road.lowered.values()]
    return f"{sites[0]} sites rewritten for training, {sites[1]} for decoding"


def _train(road: Road) -> str:
    """Ten steps on two documents lower both losses and keep every number finite."""
    assert road.mask is not None
    recipe = inputs.recipe()
    trainer = Trainer(road.lowered["train"], recipe, road.mask, inputs.rows(recipe), seed=0)
    steps = [trainer.advance().read(road.tokenizer) for _ in range(inputs.STEPS)]
    texts = []
    for name, title in (("ar_loss", "AR"), ("diffusion_loss", "diffusion")):
        first, last = steps[0][name], steps[-1][name]
        text = f"{title} loss {first:.2f} -> {last:.2f}"
        if not last < LOSS_FALL * first:
            raise StageError(f"{text} in {inputs.STEPS} steps on a batch that can be memorised")
        texts.append(text)
    bad = [name for name, value in trainer.parameters.items() if not bool(value.isfinite().all())]
    if bad:
        raise StageError(f"parameter {bad[0]} is not finite after {inputs.STEPS} steps")
    return ", ".join(texts)


def _checkpoint(road: Road) -> str:
    """Saved, and opened by plain transformers: the same causal logits, the same parameters."""
    from transformers import AutoModelForCausalLM

    assert road.mask is not None and road.captured is not None
    recipe = inputs.recipe()
    source = road.folder / "source"
    road.model.config.save_pretrained(source)
    vector = road.mask.kind == "vector"
    manifest = Manifest(
        source=describe_source(source),
        mask=road.mask,
        decode=DecodeDefaults(recipe.diffusion.block_size, dict(recipe.readouts())),
        recipe=recipe.to_dict(),
        pipelines={target: pipeline_text(pipeline(target, mask_vector=vector)) for target in TARGETS},
        data={"steps": inputs.STEPS},
        metrics={},
    )
    write_checkpoint(road.checkpoint, road.model, road.tokenizer, manifest, road.captured.extra)
    opened: Any = trust.opened(AutoModelForCausalLM, road.checkpoint, attn_implementation=EAGER).eval()
    before, after = road.model.state_dict(), opened.state_dict()
    changed = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    if changed:
        raise StageError(f"{type(opened).__name__} opens the checkpoint without the saved {changed[0]}")
    ids = torch.tensor([inputs.prompts()[1]])
    with torch.no_grad():
        theirs = opened(input_ids=ids).logits
        ours = road.captured(ids, position_ids=torch.arange(ids.shape[1])[None])
    difference = _relative(ours, theirs)
    if not difference <= LOGIT_TOLERANCE:
        raise StageError(f"plain transformers gives other logits: they differ by {difference:.1e} of the largest")
    road.model = opened
    return f"{type(opened).__name__}, logits within {difference:.0e}"


def _causal(road: Road) -> str:
    """Greedy tokens equal those of transformers' own forward on the whole text, token by token."""
    road.opened = api.load(road.checkpoint, kernels="torch")
    for temperature in (0.0, 1.0):
        road.causal[temperature] = _tokens(road, "causal", temperature=temperature)
    for prompt, new in zip(inputs.prompts(), road.causal[0.0], strict=True):
        _check_greedy(road, prompt, new, range(len(new)))
    return f"{sum(map(len, road.causal[0.0]))} tokens as transformers chooses them"


def _ar_trust(road: Road) -> str:
    """Token for token what causal decoding gives, greedy and sampled, with both kinds of drafts."""
    compared, forwards = 0, 0
    for temperature, expected in road.causal.items():
        for drafts in HEADLESS:
            got = _generate(road, "ar-trust", temperature=temperature, drafts=drafts)
            if [output.token_ids for output in got] != expected:
                raise StageError(f"AR-Trust gives other tokens than causal decoding (T = {temperature:g}, {drafts})")
            compared += sum(len(tokens) for tokens in expected)
            forwards += sum(output.forwards for output in got)
    return f"{compared} tokens as in causal decoding, {compared / forwards:.2f} per forward"


def _diffusion_trust(road: Road) -> str:
    """Without a recheck the first token of every block is what transformers chooses after the text so far: no denoising
    step has left a trace in the caches. The mask token is never emitted, and a batch gives what its prompts give alone.
    With a recheck of 1 the text is that of causal decoding."""
    assert road.mask is not None
    outputs = _generate(road, "diffusion-trust", recheck=0.0)
    tokens = [output.token_ids for output in outputs]
    for prompt, new in zip(inputs.prompts(), tokens, strict=True):
        if road.mask.token_id in new:
            raise StageError("Diffusion-Trust emits the mask token")
        _check_greedy(road, prompt, new, range(0, len(new), inputs.BLOCK_SIZE))
    assert road.opened is not None
    alone = road.opened.generate_ids(
        inputs.prompts()[:1], mode="diffusion-trust", recheck=0.0, max_new_tokens=NEW_TOKENS
    )
    if alone[0].token_ids != tokens[0]:
        raise StageError("Diffusion-Trust gives a prompt other tokens in a batch than alone")
    if _tokens(road, "diffusion-trust", recheck=1.0) != road.causal[0.0]:
        raise StageError("Diffusion-Trust with a recheck of 1 gives other tokens than causal decoding")
    count, forwards = sum(map(len, tokens)), sum(output.forwards for output in outputs)
    return f"{count} tokens, {count / forwards:.2f} per forward"


def _inspect(road: Road) -> str:
    """The program can be shown from the configuration alone, every layer with its mixers."""
    texts = []
    for target in TARGETS:
        recorder = Recorder()
        program = open_program(road.checkpoint, target, on_pass=recorder)
        summary = summarize(program)
        text = as_text(summary, program, diff=recorder)
        shown = sorted(layer for group in summary.groups for layer in group.layers)
        if shown != list(range(summary.layers)):
            raise StageError(f"the {target} program is shown with layers {shown} of {summary.layers}")
        listed = sum(len(group.layers) * len(group.mixers) for group in summary.groups)
        held = sum(mixer_kind(node) is not None for node in program.graph.nodes)
        if listed != held:
            raise StageError(f"the {target} program holds {held} mixers and is shown with {listed}")
        if any(mixer.call not in text for group in summary.groups for mixer in group.mixers):
            raise StageError(f"the text of the {target} program leaves a mixer out")
        texts.append(f"{len(text.splitlines())} lines for {target}")
    return ", ".join(texts)


def _verify(road: Road) -> str:
    """Those invariants of docs/semantics.md section 5 that `flarec verify` shows: 1 to 7, and 11 of Diffusion-Trust."""
    results = list(verify(road.checkpoint))
    for result in results:
        if not result.passed:
            raise StageError(
                f"invariant {result.invariant} ({result.title}): difference {result.difference:.1e}, bound "
                f"{result.bound:.1e}{''.join(f'; {note}' for note in result.notes[:1])}"
            )
    return f"{len(results)} invariants"


STAGES: dict[str, Callable[[Road], str]] = {
    "capture": _capture,
    "passes": _passes,
    "train": _train,
    "checkpoint": _checkpoint,
    "causal": _causal,
    "ar_trust": _ar_trust,
    "diffusion_trust": _diffusion_trust,
    "inspect": _inspect,
    "verify": _verify,
}
"""In order; what a stage asks for is in its docstring."""

_NEEDS = {
    "passes": ("capture",), "train": ("passes",), "checkpoint": ("train",), "causal": ("checkpoint",),
    "ar_trust": ("causal",), "diffusion_trust": ("causal",), "inspect": ("checkpoint",), "verify": ("checkpoint",),
}


def try_family(family: str) -> Trial:
    """Send a family's small model through all stages (float32, on the CPU); a failing stage is kept as its sentence.

    Raises `UsageError` for a family without a small model, or one that the installed transformers does not have.
    """
    config = tiny.tiny_config(family).get_text_config()
    with tempfile.TemporaryDirectory() as folder:
        road = Road(family, Path(folder))
        stages = dict(_outcomes(road))
    parameters = sum(p.numel() for p in road.model.parameters()) if road.model is not None else 0
    return Trial(family, semantic_ops(road.captured), config.num_hidden_layers, config.hidden_size, parameters, stages)


def _outcomes(road: Road) -> Iterator[tuple[str, Outcome]]:
    failed: set[str] = set()
    for name, stage in STAGES.items():
        start = time.perf_counter()
        missing = [need for need in _NEEDS.get(name, ()) if need in failed]
        if missing:
            failed.add(name)
            yield name, Outcome(False, 0.0, f"not reached: {missing[0]} failed")
            continue
        try:
            detail, passed = stage(road), True
        except Exception as error:  # whatever breaks is this stage's finding
            lines = str(error).strip().splitlines() or [""]
            detail = lines[0] if isinstance(error, FlarecError) else f"{type(error).__name__}: {lines[0]}"
            passed = False
            failed.add(name)
        yield name, Outcome(passed, time.perf_counter() - start, detail)


def semantic_ops(program: Program | None) -> dict[str, int]:
    """Semantic ops of a captured program and how often they occur."""
    counts = program.op_counts() if program is not None else {}
    return {name.removeprefix("flarec."): n for name, n in sorted(counts.items()) if name.startswith("flarec.")}


def _relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, in units of the largest number of `b`; NaN counts as infinite."""
    difference = float((a - b).detach().abs().max()) / float(b.detach().abs().max())
    return math.inf if math.isnan(difference) else difference


def _generate(road: Road, mode: str, **options: Any) -> list[api.Output]:
    assert road.opened is not None
    return road.opened.generate_ids(inputs.prompts(), mode=mode, max_new_tokens=NEW_TOKENS, seed=5, **options)


def _tokens(road: Road, mode: str, **options: Any) -> list[list[int]]:
    return [output.token_ids for output in _generate(road, mode, **options)]


def _check_greedy(road: Road, prompt: list[int], new: list[int], places: range) -> None:
    """Each of these new tokens is the best one after everything before it, says plain transformers."""
    assert road.mask is not None
    with torch.no_grad():
        logits = road.model(input_ids=torch.tensor([prompt + new])).logits[0, len(prompt) - 1 :]
    if road.mask.suppress is not None:
        logits[:, road.mask.suppress] = -math.inf
    for place in places:
        best, chosen = float(logits[place].max()), float(logits[place, new[place]])
        scale = float(logits[place][logits[place].isfinite()].abs().max())
        if not best - chosen <= LOGIT_TOLERANCE * scale:
            raise StageError(
                f"new token {place} is {new[place]}, where transformers chooses {int(logits[place].argmax())}"
            )
