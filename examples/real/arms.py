"""What is compared on a real model: overrides of the recipe `adapter`, by name (data for `compare.py`)."""

from __future__ import annotations

COMMON = ("optimizer.lr=3e-3", "diffusion.grids=3", "diffusion.block_size=5")
"""Of every arm, unless it says otherwise: what was chosen before on other prompts (docs/objectives.md)."""

ARMS: dict[str, tuple[str, ...]] = {
    "base": (),
    "rank-16": ("adapter.rank=16",),
    "rank-128": ("adapter.rank=128",),
    "rank-256": ("adapter.rank=256", "optimizer.lr=1e-3"),  # at 3e-3 it ended in NaN once
    "one-grid": ("diffusion.grids=1",),
    "random-offset": ("diffusion.grid_offset=random",),
    "kl": ("diffusion.loss=kl", "diffusion.earlier_losses=[]"),
    "tv": ("diffusion.loss=tv", "diffusion.earlier_losses=[]"),
    "tv-weighted": ("diffusion.loss=tv", "diffusion.earlier_losses=[]", "diffusion.slot_weights=accept-until-fail"),
    "ce": ("diffusion.loss=ce", "diffusion.earlier_losses=[]"),
    "el-alone": ("diffusion.earlier_losses=[]",),
    "block-3": ("diffusion.block_size=3",),
    "block-8": ("diffusion.block_size=8",),
    "growing-blocks": ('diffusion.earlier_block_sizes=["2:0.25", "3:0.5"]', "diffusion.grids=2"),
    "attention-only": ("adapter.targets=q_proj+k_proj+v_proj+o_proj",),
    "random-ids": ("mask_token=random",),
    "rate-1e-3": ("optimizer.lr=1e-3",),
    "nf4": ("adapter.base=nf4",),  # needs pip install 'flarec[quantized]' (bitsandbytes), which nothing else here does
    "own": (),
    "given": (),
}
"""In the order in which they run; `base` first, because the others are compared with it, seed by seed."""

DATA = {"own": "own", "given": "given"}
"""Arms that learn from data of their own (`--data-of KEY=FILE`): here the model's answers to prompts, and what packages
have in their place (pairs.py). All others learn from `--data`."""
BESIDE = {"own": "own", "given": "own"}
"""What an arm is compared with, where that is not `base`."""


def overrides(name: str) -> list[str]:
    """Of an arm; a later one of a key replaces an earlier one."""
    chosen = dict(setting.split("=", 1) for setting in (*COMMON, *ARMS[name]))
    return [f"{key}={value}" for key, value in chosen.items()]
