"""Optimizer steps on one rank and on several: speed, memory, communication that nothing hides, and the same losses.

    torchrun --nproc-per-node 1 -m benchmarks.ranks --part flare --rows 8 --out one.json --commit $(git rev-parse HEAD)
    torchrun --nproc-per-node 2 -m benchmarks.ranks --part flare --rows 16 --against one.json --out two.json
    torchrun --nproc-per-node 2 -m benchmarks.ranks --part flare --rows 8 --against one.json --out same.json

Shapes, data and recipes are those of `flarec bench train`. `--rows` counts the rows of a step on all ranks: the second
line has as many per rank as the first and compares speed and memory, the third has the same rows and compares losses,
gradient norms and weights. Without a GPU: `--shape tiny --length 64`, to see whether the script runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from flarec.bench.shapes import SHAPES, build
from flarec.bench.training.part import GIB, stream
from flarec.bench.training.profile import kernels_of, length, seconds_of, union
from flarec.bench.training.shapes import RECIPES, PartPlan
from flarec.device import resolve_compile, torch_device
from flarec.frontend.export import capture
from flarec.passes import lower
from flarec.recipe import load_recipe
from flarec.train.adapter import adapter_of, start_adapter
from flarec.train.loop import Trainer
from flarec.train.mask_token import MaskToken
from flarec.train.ranks.group import Ranks, joined

CUDA = torch.cuda.is_available()


def made(options: argparse.Namespace, ranks: Ranks) -> Trainer:
    base, more = RECIPES[options.part]
    recipe = load_recipe(base).override([
        *more, f"optimizer.batch_rows={options.rows}", f"optimizer.micro_rows={options.micro}",
        f"data.max_length={options.length}", "optimizer.lr=1e-5", "optimizer.warmup_steps=0",
        "optimizer.precision=bf16", "optimizer.steps=1000",
        f"train.shard={options.shard}", f"train.memory={options.memory}",
    ])
    device = torch_device(ranks.device)
    compiles = resolve_compile(options.compile, device)
    model = build(options.shape, device)
    captured, adapter = capture(model), adapter_of(recipe)
    start_adapter(captured, recipe, 0, print)
    program = lower(
        captured, "train", mask_vector=adapter is not None, kernels="triton" if CUDA else "torch", adapter=adapter,
        regions=compiles,
    )
    size = model.config.vocab_size
    mask = MaskToken("vector", size) if adapter else MaskToken("row", size - 1)
    plan = PartPlan(options.part, options.shape, str(device), options.rows, options.length, (options.micro,))
    return Trainer(program, recipe, mask, stream(plan, size), seed=0, ranks=ranks)


def shares(step: Callable[[], object]) -> dict[str, float] | None:
    """Of the time between the first and the last kernel of some steps: in which none runs, in which one of NCCL does,
    and in which only those of NCCL do."""
    if not CUDA:
        return None
    kernels = kernels_of(step)
    every, own, nccl = (
        union(span for name, span in kernels if kind in (None, name.startswith("nccl"))) for kind in (None, False, True)
    )
    whole = every[-1][1] - every[0][0]
    return {
        "idle": 1 - length(every) / whole, "communication": length(nccl) / whole,
        "communication_exposed": (length(every) - length(own)) / whole,
    }


def measured(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    trainer = made(options, ranks)
    start = time.perf_counter()
    log = [trainer.advance().read(None) for _ in range(options.compared)]
    first = time.perf_counter() - start
    with trainer.whole():
        sums = {name: float(value.detach().double().norm()) for name, value in trainer.parameters.items()
                if ranks.first or options.shard == "optimizer"}
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    times = sorted(seconds_of(trainer.advance, 2) for _ in range(options.repeats))
    seconds, clean = times[len(times) // 2], log[-1]["clean_tokens"]
    return {
        "part": options.part, "shape": options.shape, "rows": options.rows, "length": options.length,
        "shard": options.shard, "memory": options.memory, "compile": options.compile,
        "micro_rows": trainer.feed.micro_rows, "ranks": ranks.size, "seconds": seconds, "spread": times[-1] - times[0],
        "tokens_per_second": clean / seconds, "first_steps_seconds": first,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if CUDA else None,
        "weights_gradients_moments_gib": trainer.weight_bytes / GIB, "shares": shares(trainer.advance),
        "steps": [{key: line[key] for key in ("loss", "ar_loss", "diffusion_loss", "gradient_norm")} for line in log],
        "norms": sums,
    }


def against(found: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """Ratios to a result of fewer ranks; with the same rows, how far losses, gradient norms and weights are apart."""
    kept = "weights_gradients_moments_gib"
    ratios = {"speed": found["tokens_per_second"] / one["tokens_per_second"], kept: found[kept] / one[kept]}
    if one["peak_gib"]:
        ratios["peak"] = found["peak_gib"] / one["peak_gib"]
    if found["rows"] != one["rows"]:
        return ratios

    def apart(pairs: Iterable[tuple[float, float]]) -> float:
        return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)

    for key in ("loss", "gradient_norm"):
        pairs = zip(found["steps"], one["steps"], strict=True)
        ratios[f"{key}_apart"] = apart((a[key], b[key]) for a, b in pairs)
    ratios["norms_apart"] = apart((found["norms"][name], value) for name, value in one["norms"].items())
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=RECIPES, default="flare")
    parser.add_argument("--shape", choices=SHAPES, default="2B")
    parser.add_argument("--rows", type=int, default=8, help="of a step, on all ranks")
    parser.add_argument("--micro", type=int, default=4, help="rows of a pass")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--shard", choices=("optimizer", "parameters"), default="optimizer", help="train.shard")
    parser.add_argument("--memory", choices=("keep", "recompute"), default="keep", help="train.memory")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="off", help="by region")
    parser.add_argument("--compared", type=int, default=3, help="first steps whose numbers are kept")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    with joined("auto") as ranks:
        found = measured(options, ranks)
    if ranks.first:
        device = torch.cuda.get_device_name() if CUDA else platform.machine()
        versions = {"device": device, "torch": torch.__version__, "commit": options.commit}
        compared = against(found, json.loads(options.against.read_text())) if options.against else {}
        result = {**versions, **found, "against": compared}
        print(json.dumps({key: value for key, value in result.items() if key != "norms"}, indent=1))
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
