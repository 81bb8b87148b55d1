"""Which loss teaches an adapter to draft? The recipe `adapter` on the bundled tiny model, loss by loss.

    OMP_NUM_THREADS=1 python -m benchmarks.losses_tiny --out benchmarks/results/losses-tiny-cpu.json

Data order, noise, steps, measurement: those of `noise_tiny.py`. "recipe" is KL for half of the steps and the expected
accepted length behind it, "short-kl" KL for a fifth of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import flarec
from benchmarks import noise_tiny
from flarec.recipe import load_recipe

LOSSES: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "short-kl": ('diffusion.earlier_losses=["kl:0.2"]',),
    "el": ("diffusion.earlier_losses=[]",),
    "tv": ("diffusion.loss=tv", "diffusion.earlier_losses=[]"),
    "kl": ("diffusion.loss=kl", "diffusion.earlier_losses=[]"),
    "ce": ("diffusion.loss=ce", "diffusion.earlier_losses=[]"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=noise_tiny.TINY, capture_output=True, text=True,
                           check=False)
    table: dict[str, Any] = {
        "command": "python -m benchmarks.losses_tiny " + " ".join(sys.argv[1:]), "commit": found.stdout.strip() or None,
        "device": noise_tiny.device_text("cpu"),
        "versions": {"flarec": flarec.__version__, "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "losses": LOSSES, "runs": [],
    }
    start = time.monotonic()
    for seed in range(options.seeds):
        for loss, overrides in LOSSES.items():
            recipe = load_recipe("adapter").override([
                *noise_tiny.SETTINGS, f"optimizer.steps={options.steps}", "optimizer.batch_rows=1",
                "optimizer.micro_rows=1", *overrides,
            ])
            run = noise_tiny.run(recipe, "vector", seed, options)
            table["runs"].append({"loss": loss, **run})
            table["summary"] = noise_tiny.summary(table["runs"], "loss", tuple(LOSSES))
            options.out.write_text(json.dumps(table, indent=1) + "\n")
            print(f"{time.monotonic() - start:.0f} s: {loss} {seed}: {run['T=0']['tokens_per_forward']:.3f}, "
                  f"{run['T=1']['tokens_per_forward']:.3f}", flush=True)
    print(json.dumps(table["summary"], indent=1))


if __name__ == "__main__":
    main()
