"""What a run tells its user about its own recipe, one line each: things that are allowed and rarely wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..recipe import Recipe

FAR_OFF = 10.0
"""A learning rate so many times above or below the recipe's own is said to be far off."""
MANY_EPOCHS = 16
"""A run that passes over its documents more often is said to repeat them."""
ROSE_MUCH = 0.05
"""A held-out AR loss that rose by more than this part is said to have risen much: the model forgets."""


def before_training(recipe: Recipe, own: Recipe) -> list[str]:
    """Lines about the numbers of a run. own: the recipe as it is without the user's changes."""
    optimizer, save, lines = recipe.optimizer, recipe.save.every, []
    steps, warmup, lr, usual = optimizer.steps, optimizer.warmup, optimizer.lr, own.optimizer.lr
    if warmup >= steps:
        lines.append(
            f"a warmup of {warmup} steps is not shorter than the run of {steps} steps: the rate rises to the "
            f"end, to {optimizer.lr_at(steps - 1):.3g}; a tenth of the steps is usual ({max(1, steps // 10)})"
        )
    if save >= steps:
        lines.append(
            f"save.every = {save} saves nothing before the last of {steps} steps: a run that is killed starts again "
            f"(Ctrl-C saves); set save.every={max(1, steps // 5)}"
        )
    if own.adapter.rank and not recipe.adapter.rank:
        lines.append(
            f"adapter.rank = 0 trains the model itself, here with lr = {lr:.3g} and objective.ar_weight = "
            f"{recipe.objective.ar_weight:g}; --recipe dual and --recipe draft are for that"
        )
    if lr / usual >= FAR_OFF or usual / lr >= FAR_OFF:
        times = f"{lr / usual:,.3g} times" if lr > usual else f"1/{usual / lr:,.3g} of"
        lines.append(f"optimizer.lr = {lr:.3g} is {times} the recipe's own {usual:.3g}")
    return lines


def about_repeats(source: str, documents: int, epochs: float) -> list[str]:
    """Lines about how often a run passes over the documents of a source."""
    if epochs <= MANY_EPOCHS:
        return []
    return [
        f"the run passes about {epochs:,.0f} times over the {documents:,} documents of {source}: it learns them by "
        "heart; give more data, a smaller weight, or fewer steps"
    ]


def after_training(evaluations: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Lines about what was measured. evaluations: by step."""
    if 0 not in evaluations or len(evaluations) < 2:
        return []
    last = max(evaluations)
    first, now = (evaluations[step]["ar_loss"] for step in (0, last))
    if not first > 0 or now <= first * (1 + ROSE_MUCH):
        return []
    return [
        f"held-out AR loss rose by {now / first - 1:.0%} ({first:.3f} before, {now:.3f} at step {last}): the model "
        "forgets; lower optimizer.lr, or train on answers of the source itself (--prompts)"
    ]
