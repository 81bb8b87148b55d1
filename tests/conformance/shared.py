"""What the tests of one family share in a process: model, capture, lowered programs, and a converted checkpoint.

Tests are parametrised by `EVERY`; under `--dist loadgroup` all tests of a family run in one process.
"""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flarec.api import Model, load
from flarec.passes import lower
from flarec.train.convert import convert
from flarec.train.metrics import read_metrics
from flarec.train.prepare import Run, prepare
from flarec.verify import Subject
from tests.cli.conversions import write_data
from tests.models import ALL_FAMILIES, PLAIN_FAMILIES, captured, captured_float64, shared_model, tiny_checkpoint

AGAIN = ("mamba", "falcon_mamba")
"""Families whose mixers are those of jamba, without what is between them: `flarec families --run` has their stages."""
NAMES = tuple(name for name in (*ALL_FAMILIES, *PLAIN_FAMILIES) if name not in AGAIN)
EVERY = [pytest.param(name, marks=pytest.mark.xdist_group(name), id=name) for name in NAMES]
COVER = ("qwen3_5_text", "kimi_linear", "minimax", "falcon_h1", "jamba", "zaya", "lfm3", "recurrent_gemma", "gemma2")
"""Families that between them have every mixer, experts and soft caps."""
COVERING = EVERY if os.environ.get("FLAREC_EVERY_FAMILY") else [param for param in EVERY if param.id in COVER]
"""For what takes seconds: conversions, generated texts. The invariants about logits, gradients and states go through
all families, and so does capture (tests/frontend/test_export.py). `make test-families` takes them all everywhere."""
BLOCK_SIZE = 3
MASK_ID = 400
SETTINGS = [
    "optimizer.steps=10", "optimizer.lr=3e-3", "optimizer.warmup_steps=0", "optimizer.batch_rows=2",
    "data.max_length=64", "diffusion.mask=all", "diffusion.views=1", f"diffusion.block_size={BLOCK_SIZE}",
    "evaluation.every=0",
]
DIRECTORY = tempfile.TemporaryDirectory(prefix="flarec-families-")


def eager(stock_model: Any) -> Any:
    """With eager attention, which is the definition: under transformers 5.17 gemma2's default, sdpa, leaves out the
    softcap."""
    stock_model.set_attn_implementation("eager")
    return stock_model


@functools.cache
def model(family: str) -> Any:
    """The stock model, float32: do not change it."""
    return eager(shared_model(family))


@functools.cache
def subject(family: str, *, float64: bool = False) -> Subject:
    """Lowered with every property checked after every pass."""
    program = captured_float64(family) if float64 else captured(family)
    train, decode = (lower(program, target, debug=True) for target in ("train", "decode"))
    return Subject(train, decode, model(family), MASK_ID, block_size=BLOCK_SIZE, suppress=(MASK_ID,))


@dataclass(frozen=True)
class Converted:
    """What `flarec convert` made of the tiny model: the run in memory, what each step reported, the directories."""

    run: Run
    steps: list[dict[str, Any]]
    source: Path
    path: Path


@functools.cache
def converted(family: str) -> Converted:
    """Ten optimizer steps on documents that the model can memorise; all-masked blocks, so that the loss of a step does
    not depend on a draw of mask rates."""
    place = Path(DIRECTORY.name) / family
    source = tiny_checkpoint(place / "source", family)
    data = write_data(place / "data.jsonl", documents=4)
    runs: list[Run] = []

    def prepared(*arguments: Any) -> Run:
        runs.append(prepare(*arguments))
        return runs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flarec.train.convert.prepare", prepared)
        path = convert(source, data, recipe="flare", out=place / "out", overrides=SETTINGS, device="cpu", debug=True)
    steps = [line for line in read_metrics(path / "metrics.jsonl") if "evaluation" not in line]
    return Converted(runs[0], steps, source, path)


@functools.cache
def opened(family: str) -> Model:
    """The checkpoint as users open it."""
    return load(converted(family).path)


@functools.cache
def stock(family: str) -> Any:
    """The checkpoint in plain transformers."""
    from transformers import AutoModelForCausalLM

    path = converted(family).path
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
