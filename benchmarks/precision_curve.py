"""Does bfloat16 train as float32 does? Loss curves of the bundled tiny model, and what sums of gradients lose.

    python benchmarks/precision_curve.py --out benchmarks/results/precision-curve.json --device cuda
    python benchmarks/precision_curve.py --steps 100 --rows 2 --length 128 --device cpu
    python benchmarks/precision_curve.py --moments 8bit --device cpu --out benchmarks/results/moments-curve-cpu.json

"curves": the recipe `dual` in float32 with three seeds and in bfloat16 with the first of them, same batches and noise.
The distance of bfloat16 to float32 is to stay within the spread of the seeds (mean over steps and seeds of the distance
to the mean of the seeds, losses smoothed over ten steps). "sums": the relative error of a gradient added up over many
micro batches in bfloat16 and in float32, to float64: why `Weights.collect` adds in float32.

With `--moments 8bit` what is compared with float32 are AdamW's moments in 8 bits, computed in float32, with each of the
three seeds, and "state" has the bytes that the optimizer keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("FLAREC_CACHE_DIR", "off")

import torch
from torch import nn

from flarec.checkpoint.directory import open_checkpoint
from flarec.frontend.export import capture
from flarec.passes import lower
from flarec.recipe import Recipe, load_recipe
from flarec.train.data.packing import RowStream
from flarec.train.data.sources import load_sources, parse_source
from flarec.train.loop import Trainer
from flarec.train.mask_token import choose_mask_token, initialise_mask_token
from flarec.train.moments import EIGHT_BIT
from flarec.train.objective.batch import build_batches
from flarec.train.objective.noise import step_generator
from flarec.train.precision import DTYPES, Precision, Weights, exact_weights, keep_float32

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny"
SEEDS, SMOOTH = (0, 1, 2), 10
MICRO_BATCHES = (8, 64)
SUMMED = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def trainer(recipe: Recipe, precision: Precision, seed: int, device: torch.device) -> Trainer:
    """As `flarec convert` makes it."""
    source = open_checkpoint(TINY / "model")
    tokenizer, model = source.load_tokenizer(), source.load_model(DTYPES[precision], device)
    captured = capture(model)
    exact = exact_weights(source, model, device) if precision == "bf16" else {}
    keep_float32(captured, exact)
    mask = choose_mask_token("auto", source.load_config(), tokenizer)
    initialise_mask_token(mask, model, captured, tokenizer, exact)
    kernels = "triton" if device.type == "cuda" else "torch"
    program = lower(captured, "train", mask_vector=mask.kind == "vector", kernels=kernels)
    data = load_sources([parse_source(str(TINY / "data" / "train.jsonl"))], tokenizer,
                        max_length=recipe.data.max_length, skip_bad_lines=False, end_ids=())
    rows = RowStream(data, max_length=recipe.data.max_length, seed=seed, lookahead=recipe.data.lookahead)
    return Trainer(program, recipe, mask, rows, seed, exact)


def curve(recipe: Recipe, precision: Precision, seed: int, device: torch.device) -> tuple[list[float], int]:
    """(losses, bytes that the optimizer keeps)."""
    made = trainer(recipe, precision, seed, device)
    steps = [made.advance() for _ in range(recipe.optimizer.steps)]
    kept = sum(value.nbytes for state in made.optimizer.state.values() for value in state.values())
    return [float(step.read(None)["loss"]) for step in steps], kept


def smoothed(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unfold(0, min(SMOOTH, len(values)), 1).mean(1)


def curves(recipe: Recipe, device: torch.device, jobs: int, moments: str) -> dict[str, Any]:
    low: tuple[Precision, str, tuple[int, ...]] = ("bf16", "bf16", SEEDS[:1])
    if moments == EIGHT_BIT:
        low = "float32", f"{moments} moments", SEEDS
    precision, name, seeds = low
    other = recipe.override([f"optimizer.moments={moments}"])
    runs: dict[str, tuple[Recipe, Precision, int, torch.device]] = {
        **{f"float32, seed {seed}": (recipe, "float32", seed, device) for seed in SEEDS},
        **{f"{name}, seed {seed}": (other, precision, seed, device) for seed in seeds},
    }
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:  # a run waits for its host, not for a GPU
        done = dict(zip(runs, pool.map(curve, *zip(*runs.values(), strict=True)), strict=True))
    losses = {run: values for run, (values, _) in done.items()}
    smooth = {run: smoothed(values) for run, values in losses.items()}
    plain = torch.stack([smooth[f"float32, seed {seed}"] for seed in SEEDS])
    spread = float((plain - plain.mean(0)).abs().mean())
    apart = torch.stack([(smooth[f"{name}, seed {seed}"] - smooth[f"float32, seed {seed}"]).abs() for seed in seeds])
    words = name.replace(" ", "_")
    return {
        "losses": losses, "state": {run: kept for run, (_, kept) in done.items()}, "spread_of_seeds": spread,
        f"{words}_to_float32": float(apart.mean()), f"{words}_to_float32_last": float(apart[:, -1].mean()),
        "verdict": "met" if float(apart.mean()) <= spread else "missed",
    }


class Sums(Weights):
    """Weights whose 16-bit gradients are added up in several dtypes, and nowhere else."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self.found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in SUMMED}

    def arrive(self, name: str) -> None:
        """Gradients wait until the backward pass is over."""

    def collect(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is None or parameter is self.masters[name]:
                continue
            for kind, table in self.found.items():
                grad = parameter.grad.to(SUMMED[kind])
                table[name] = table[name] + grad if name in table else grad
            parameter.grad = None


def sums(recipe: Recipe, device: torch.device) -> list[dict[str, float]]:
    """Micro batches of one row, all weights together."""
    results = []
    for count in MICRO_BATCHES:
        made = trainer(recipe, "bf16", 0, device)
        rows = made.rows.rows(count)
        batches = build_batches(rows, recipe.diffusion, made.mask.token_id, step_generator(0, 0), micro_rows=1)
        made.weights = added = Sums(made.parameters)
        made.accumulate(batches)
        exact = added.found["float64"]
        size = sum(float(value.square().sum()) for value in exact.values()) ** 0.5
        error = {
            kind: sum(float((table[n].double() - exact[n]).square().sum()) for n in exact) ** 0.5 / size
            for kind, table in added.found.items()
            if kind != "float64"
        }
        results.append({"micro_batches": count, **error})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--moments", choices=("float32", EIGHT_BIT), default="float32")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, a process each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    start, device = time.monotonic(), torch.device(options.device)
    recipe = load_recipe("dual").override([
        f"optimizer.steps={options.steps}", f"optimizer.batch_rows={options.rows}", "optimizer.micro_rows=1",
        f"optimizer.lr={options.lr}", "optimizer.warmup_steps=10", f"data.max_length={options.length}",
    ])
    result: dict[str, Any] = {} if options.moments == EIGHT_BIT else {"sums": sums(recipe, device)}
    result["curves"] = curves(recipe, device, options.jobs, options.moments)
    for name, value in result["curves"].items():
        if name != "losses":
            print(f"{name:<24} {value}")
    print(f"sums: {result.get('sums')}")
    if options.out:
        record = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": " ".join(["python benchmarks/precision_curve.py", *sys.argv[1:]]),
            "commit": options.commit, "seconds": round(time.monotonic() - start, 1), **result,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(result["curves"]["verdict"] == "missed")


if __name__ == "__main__":
    sys.exit(main())
