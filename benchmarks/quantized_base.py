"""An adapter over a frozen model that is held as stored, in 8 bits and in 4 (`adapter.base`).

    python -m benchmarks.quantized_base drafts --out benchmarks/results/quantized-base-cpu.json --commit ID
    python -m benchmarks.quantized_base step --shapes 2B,9B --out FILE.json --commit ID     # on a GPU

`drafts` converts the bundled tiny model once per base, with equal seed and data, and lets every checkpoint, whose model
is the stored one, solve the same held-out tasks: what do drafts lose that were learned over codes? `step` trains shapes
with random weights on rows of random tokens, layers computed again, and tells memory and time of a step.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import flarec
from flarec.bench.shapes import SHAPES, build
from flarec.bench.training.part import GIB, stream
from flarec.bench.training.profile import seconds_of
from flarec.bench.training.shapes import PartPlan
from flarec.checkpoint.manifest import Manifest
from flarec.evaluate import evaluate, read_examples
from flarec.frontend.export import capture
from flarec.passes import lower
from flarec.recipe import Recipe, load_recipe
from flarec.train.adapter import adapter_of, start_adapter
from flarec.train.loop import Trainer
from flarec.train.mask_token import MaskToken
from flarec.train.quantized_base import quantize_base

TINY = Path(__file__).parents[1] / "examples" / "tiny"
Keep = Callable[[dict[str, Any]], None]


def drafts(options: argparse.Namespace, keep: Keep) -> None:
    """By base and seed the tokens per forward of AR-Trust on held-out tasks, over the stored model."""
    for seed in range(options.seeds):
        for base in options.bases.split(","):
            with tempfile.TemporaryDirectory() as folder:
                lines: list[str] = []
                out = flarec.convert(
                    TINY / "model", [TINY / "data" / "train.jsonl"], recipe=str(TINY / "recipe.toml"),
                    out=Path(folder) / base, seed=seed, steps=options.steps, eval_data=[TINY / "data" / "test.jsonl"],
                    overrides=[f"adapter.base={base}", f"evaluation.every={options.steps}", *options.set],
                    progress=lambda event, values, lines=lines: lines.append(str(values.get("text"))),
                )
                model = flarec.load(out)
                tasks = read_examples(TINY / "data" / "test.jsonl", model, limit=options.tasks)
                solved = evaluate(model, tasks, mode="ar-trust", batch=len(tasks))
                manifest = Manifest.read(out)
                assert manifest is not None
                held_out = manifest.metrics["held_out"][f"step {options.steps}"]
            keep({
                "base": base, "seed": seed, "steps": options.steps, "tasks": options.tasks,
                "said": [line for line in lines if line.startswith("base:")],
                "held_out_over_the_base": {name: held_out[name] for name in ("tokens_per_forward", "one_minus_tv")},
                "over_the_stored_model": {key: solved[key] for key in ("tokens_per_forward", "accuracy", "forwards")},
            })


def trainer_of(shape: str, recipe: Recipe, captured: Any, options: argparse.Namespace) -> Trainer:
    device, adapter = options.device, adapter_of(recipe)
    kernels = "triton" if device.startswith("cuda") else "torch"
    program = lower(
        captured, "train", mask_vector=True, adapter=adapter, kernels=kernels, regions=recipe.train.compile == "on"
    )
    size = captured.vocab_size
    plan = PartPlan("adapter", shape, device, options.rows, options.length, (options.rows,))
    return Trainer(program, recipe, MaskToken("vector", size), stream(plan, size), seed=0)


def step(options: argparse.Namespace, keep: Keep) -> None:
    """By shape and base the peak memory and the time of a step; the codes are made of the model that was measured as
    stored, so they are measured behind it."""
    cuda = options.device.startswith("cuda")
    captured: Any
    trainer: Any
    for shape in options.shapes.split(","):
        recipe = load_recipe("draft").override([
            "adapter.rank=64", "adapter.alpha=64", "objective.ar_weight=0", "mask_token=vector",
            f"optimizer.batch_rows={options.rows}", f"optimizer.micro_rows={options.rows}", "optimizer.lr=1e-5",
            "optimizer.warmup_steps=0", "optimizer.precision=bf16", f"data.max_length={options.length}",
            "train.memory=recompute", f"train.compile={options.compile}", *options.set,
        ])
        start = time.perf_counter()
        captured = capture(build(shape, options.device))
        start_adapter(captured, recipe, 0, print)
        print(f"{shape}: built and captured in {time.perf_counter() - start:.1f} s", flush=True)
        for base in ("stored", options.base):
            chosen = recipe.override([f"adapter.base={base}"])
            try:
                start = time.perf_counter()
                quantize_base(captured, chosen, print)
                trainer = trainer_of(shape, chosen, captured, options)
                ready = time.perf_counter() - start
                losses = [trainer.advance().read(None)["loss"] for _ in range(2)]
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                times = [seconds_of(trainer.advance, 1) for _ in range(options.repeats)]
                peak = torch.cuda.max_memory_allocated() / GIB if cuda else None
                keep({
                    "shape": shape, "base": base, "rows": options.rows, "length": options.length,
                    "memory": "recompute", "compile": options.compile, "seconds": statistics.median(times),
                    "spread": max(times) - min(times), "peak_gib": peak,
                    "weights_gradients_moments_gib": trainer.weight_bytes / GIB, "losses": losses,
                    "seconds_of_codes_and_lowering": ready,
                })
            except Exception as error:  # the other measurements go on
                keep({"shape": shape, "base": base, "error": f"{type(error).__name__}: {str(error)[:300]}"})
            trainer = None
            gc.collect()
        captured = None
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("drafts", "step"))
    parser.add_argument("--bases", default="stored,int8,nf4", help="of `drafts`")
    parser.add_argument("--base", default="nf4", help="of `step`, beside stored")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--shapes", default="2B", help=f"of {', '.join(SHAPES)}, separated by commas")
    parser.add_argument("--rows", type=int, default=1, help="of a step, all at a time")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", choices=("on", "off"), default="off")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    try:
        import bitsandbytes

        library = str(bitsandbytes.__version__)
    except ImportError:
        library = "none"
    found: list[dict[str, Any]] = []

    def keep(result: dict[str, Any]) -> None:
        found.append(result)
        print(json.dumps(result), flush=True)
        if options.out:
            versions = {"torch": torch.__version__, "bitsandbytes": library, "python": platform.python_version()}
            processor = f"{platform.machine()}, {torch.get_num_threads()} threads"
            device = torch.cuda.get_device_name() if options.device.startswith("cuda") else processor
            command = " ".join(["python -m benchmarks.quantized_base", *sys.argv[1:]])
            head = {"command": command, "commit": options.commit, "device": device, "versions": versions}
            options.out.write_text(json.dumps({**head, "results": found}, indent=1) + "\n")

    (drafts if options.what == "drafts" else step)(options, keep)


if __name__ == "__main__":
    main()
