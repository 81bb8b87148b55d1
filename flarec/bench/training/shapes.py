"""What is trained of which shape (`flarec.bench.shapes`), in which passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_ADAPTER = ["adapter.rank=64", "adapter.alpha=64", "objective.ar_weight=0", "mask_token=vector"]
_AGAIN = ["train.memory=recompute"]
RECIPES: dict[str, tuple[str, list[str]]] = {
    "ar": ("draft", ["objective.diffusion_weight=0"]),
    "flare": ("flare", []),
    "draft": ("draft", []),
    "adapter": ("draft", _ADAPTER),
    "ar-recompute": ("draft", ["objective.diffusion_weight=0", *_AGAIN]),
    "flare-recompute": ("flare", _AGAIN),
    "adapter-recompute": ("draft", [*_ADAPTER, *_AGAIN]),
    "flare-4B": ("flare", _AGAIN),
    "adapter-9B": ("draft", [*_ADAPTER, *_AGAIN]),
    "first-step": ("flare", []),
}
"""By part the recipe and what is changed of it. Of "draft", "ar" is the clean stream alone, "adapter" its objective
over a frozen model; with "-recompute", and in larger shapes, layers are computed again."""
SHAPE_OF = {"flare-4B": "4B", "adapter-9B": "9B"}
"""Parts with a shape of their own."""
MICRO: dict[str, tuple[int, ...]] = {
    "stock": (8, 4), "stock-compiled": (8, 4), "ar": (8, 4), "flare": (1, 2, 4), "draft": (4, 2), "adapter": (8, 4),
    "ar-recompute": (8, 4), "flare-recompute": (4, 2), "adapter-recompute": (8, 4), "flare-4B": (4, 2),
    "adapter-9B": (4, 2), "first-step": (1,), "doctor": (1, 2, 4),
}
"""Rows of a micro batch that are tried, by part: one after the other until one fits, those of `EVERY` all."""
EVERY = ("flare", "doctor")
"""Of these all are of interest: fewer rows for their peak, more for their speed."""
BEHIND = {"ar-recompute": "ar", "flare-recompute": "flare", "adapter-recompute": "adapter"}
"""Parts that are measured in the process of another one, behind it: they share its model and what is compiled."""
PREDICTED = ("ar", "flare", "adapter")
"""Processes that also say what `train.memory = auto` expects of their tries: that takes seconds."""
AHEAD_LAYERS = ["linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention"]
"""Every kind of neighbours and of ends: what is compiled for these layers is what a model of many needs."""


@dataclass(frozen=True)
class PartPlan:
    """What a process measures.

    part     a key of `MICRO`
    rows     of an optimizer step, `length` clean tokens each; micro: rows of a forward pass, one after the other
    compile  auto, on or off: our steps by region
    quick    shorter timings
    every    try all micro batches, not only until one fits
    ahead    nothing is measured: a pass of each size over a few layers of the shape, for the compilers' caches
    """

    part: str
    shape: str
    device: str
    rows: int
    length: int
    micro: tuple[int, ...]
    compile: str = "auto"
    quick: bool = False
    every: bool = False
    ahead: bool = False


def sizes(model: Any) -> tuple[int, int]:
    """(parameters, tied ones once; those of the head)."""
    seen = {id(value): value.numel() for value in model.parameters()}
    return sum(seen.values()), model.get_input_embeddings().weight.numel()
