"""A run whose regions are compiled: losses and gradients within rounding, also where layers are computed again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from flarec.errors import FlarecWarning
from flarec.ir import compiled
from flarec.ir.pipeline import run_pipeline
from flarec.passes.outline_regions import OutlineRegions
from flarec.passes.properties import CHECKS
from flarec.recipe import Recipe
from flarec.train import loop
from flarec.train.loop import Trainer
from flarec.train.recompute import Recomputed
from tests.models import FEW_LAYERS
from tests.train.small_run import Small, adapter_recipe, recipe, small, source
from tests.train.test_recompute import ran

RECOMPUTE, KEEP = "train.memory=recompute", "train.memory=keep"


def few(family: str, choice: str = "auto", chosen: Recipe | None = None) -> Small:
    """A layer of each kind, and rows of one length: other lengths are compiled once more."""
    run = Small(family, choice, chosen=chosen, **FEW_LAYERS[family])
    run.data = source(lengths=range(20, 21))
    return run


def outlined(run: Small) -> Small:
    """The same run with marked regions."""
    marked = copy.copy(run)
    marked.program = run_pipeline(run.program, [OutlineRegions()], CHECKS)
    return marked


def gradients(run: Small, chosen: Recipe) -> tuple[Trainer, dict[str, Tensor]]:
    """A trainer, and the losses and gradients of its first step: AdamW would make large of small what is rounding."""
    trainer = run.trainer(chosen)
    given = trainer.feed.take(0)
    losses, _, _ = trainer.accumulate(given.batches)
    found = {name: master.grad for name, master in trainer.weights.masters.items() if master.grad is not None}
    return trainer, {"losses": losses, **{name: value.clone() for name, value in found.items()}}


def check(
    run: Small, chosen: Recipe, backend: str, monkeypatch: pytest.MonkeyPatch, memory: Sequence[str] = (KEEP, RECOMPUTE)
) -> None:
    codes = compiled.Codes(backend)  # one for all trainers of a test, so that equal regions are compiled once
    monkeypatch.setattr(loop, "Codes", lambda: codes)
    _, theirs = gradients(run, chosen.override([KEEP]))
    for more in memory:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FlarecWarning)
            trainer, ours = gradients(outlined(run), chosen.override([more]))
        modules = list(trainer.program.run.modules())  # type: ignore[union-attr]
        assert any(isinstance(module, compiled.Region) for module in modules)
        assert any(isinstance(module, Recomputed) for module in modules) == (more == RECOMPUTE)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            scale = float(theirs[name].abs().max())
            assert float((value - theirs[name]).abs().max()) <= 1e-4 * scale, name


def test_a_compiled_step_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    check(small("bamba"), recipe("flare"), "eager", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "memory"), [("qwen3_5_text", [KEEP, RECOMPUTE]), ("kimi_linear", [RECOMPUTE]), ("bamba", [KEEP])]
)
def test_a_step_that_autograd_compiles_is_the_eager_one(
    family: str, memory: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = few(family)
    if family == "bamba":
        run.data = source()  # of several lengths
    check(run, recipe("flare"), "aot_eager", monkeypatch, memory)


@pytest.mark.slow
def test_a_compiled_adapter_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = adapter_recipe()
    check(few("kimi_linear", "vector", chosen), chosen, "aot_eager", monkeypatch, [RECOMPUTE])


@pytest.mark.slow
def test_inductor_trains_as_eager_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some steps, the losses within rounding. All three mixers of most models in one layer: every kernel of every size
    is a process of a compiler."""
    chosen = recipe("flare", KEEP)
    run = few("falcon_h1")
    check(run, chosen, "inductor", monkeypatch, [KEEP])
    (_, theirs), (_, ours) = ran(run, chosen, 3), ran(outlined(run), chosen, 3)
    for name in (name for name in theirs if name.startswith(("losses", "norm"))):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
