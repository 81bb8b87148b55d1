"""Training of a noisy-row adapter over a frozen base: what is trained, and what the pipelines get.

Contract: docs/semantics.md section 6. The base is never written to: its parameters have no gradient, no optimizer state
and no masters, and stay in the dtype that they were loaded in.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..errors import RecipeError
from ..ir.program import Program
from ..passes.adapt_noisy_stream import AdaptNoisyStream, new_adapter, remarks
from ..recipe import Recipe


def adapter_of(recipe: Recipe) -> AdaptNoisyStream | None:
    """The pass that a recipe asks for; None for one that trains the model itself."""
    options = recipe.adapter
    return AdaptNoisyStream(options.rank, options.alpha, options.targets) if options.rank else None


def start_adapter(captured: Program, recipe: Recipe, seed: int, note: Callable[[str], None]) -> None:
    """Give a captured program the recipe's adapter, if any, at its start; everything lowered from it shares it.

    note is told what has no adapter of its own.
    """
    adapter = adapter_of(recipe)
    if adapter is None:
        return
    made = new_adapter(captured, adapter, seed)
    if not made:
        raise RecipeError(
            f'adapter.targets = "{adapter.modules}" names no linear layer of this model; set it to "all-linear", or to '
            "ends of names that `flarec inspect` shows, as q_proj+v_proj"
        )
    captured.extra |= made
    count = sum(parameter.numel() for parameter in made.values())
    note(f"adapter: rank {adapter.rank} on {len(made) // 2} weights, {count:,} parameters; the model itself is frozen")
    for text in remarks(captured, adapter):
        note(f"adapter: {text}")


def choose_trained(program: Program, recipe: Recipe) -> dict[str, nn.Parameter]:
    """The parameters that a run trains, by name: all of them, or with an adapter those that are not the model's (the
    adapter and the mask vector). Only they take a gradient from here on."""
    every = program.parameters()
    trained = {name: value for name, value in every.items() if not recipe.adapter.rank or name in program.extra}
    for name, parameter in every.items():
        parameter.requires_grad_(name in trained)
    return trained
