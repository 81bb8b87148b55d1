"""The arms of the ladder: recipes of this repository and what differs, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 4
SEEDS = (0, 1, 2)
BLOCKS = (1, 2, 8, 16)
"""Sizes beside `BLOCK`."""
RATE = ["optimizer.lr=6e-4"]
"""Of arms that train all weights; adapters have that of their recipes."""


@dataclass(frozen=True)
class Arm:
    """A conversion: a recipe, overrides of it, a seed; what it shows."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    seed: int = 0
    shows: str = ""

    @property
    def key(self) -> str:
        """Name of a run."""
        return f"{self.name} seed {self.seed}"


MAIN: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("ar", "draft", ("objective.diffusion_weight=0",), "AR training goes on, no diffusion"),
    ("no-ar-loss", "flare", ("objective.ar_weight=0",), "two random views over a causal clean stream, without AR loss"),
    ("flare", "flare", (), "+ AR loss: the published objective (masked-input, block_end, CE)"),
    ("masked-target", "flare", ("diffusion.supervise=masked-target",), "positions that cannot see their target"),
    ("masked-both", "flare", ("diffusion.supervise=masked-both",), "positions for which both hold"),
    ("all-masked", "flare", ("diffusion.mask=all", "diffusion.views=1"), "all masked, block_end, CE"),
    ("all-masked-causal", "draft", ("diffusion.loss=ce",), "all masked, causal, CE"),
    ("draft", "draft", (), "all masked, causal, KL"),
    ("dual", "dual", (), "half flare (masked-target), half draft"),
    ("adapter", "adapter", (f"diffusion.block_size={BLOCK}",), "frozen model, adapter on noisy rows"),
    ("adapter-dual", "adapter-dual", (f"diffusion.block_size={BLOCK}",), "the same, half of the blocks random"),
)
"""(name, recipe, overrides, what it shows)."""


def arms(seeds: tuple[int, ...] = SEEDS) -> list[Arm]:
    """All runs: the main arms seed by seed, then other block sizes of the published objective and of `draft`."""
    return [arm for several in (_main, _sizes) for seed in seeds for arm in several(seed)]


def _main(seed: int) -> list[Arm]:
    return [Arm(name, recipe, (*_rate(recipe), *more), seed, shows) for name, recipe, more, shows in MAIN]


def _sizes(seed: int) -> list[Arm]:
    return [
        Arm(f"{recipe}-block-{size}", recipe, (*RATE, f"diffusion.block_size={size}"), seed, f"blocks of {size}")
        for size in BLOCKS for recipe in ("flare", "draft")
    ]


def _rate(recipe: str) -> list[str]:
    return [] if recipe.startswith("adapter") else RATE


STEPS: tuple[tuple[str, str, str], ...] = (
    ("+ AR loss", "flare", "no-ar-loss"),
    ("supervise masked-target", "masked-target", "flare"),
    ("supervise masked-both", "masked-both", "flare"),
    ("all masked for random views", "all-masked", "flare"),
    ("+ causal readout", "all-masked-causal", "all-masked"),
    ("+ KL from the clean stream", "draft", "all-masked-causal"),
    ("half of both kinds", "dual", "draft"),
    ("adapter for all weights", "adapter", "draft"),
    ("half of the adapter's blocks random", "adapter-dual", "adapter"),
    *(
        (f"{recipe}: blocks of {size}", f"{recipe}-block-{size}", recipe)
        for recipe in ("flare", "draft") for size in BLOCKS
    ),
)
"""(step, arm with it, arm without it)."""
