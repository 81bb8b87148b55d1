"""What AdamW's moments in 8 bits cost and save: whole steps of `flare`, and the update alone, beside float32's.

    python -m benchmarks.moments --out benchmarks/results/moments-h200.json --commit $(git rev-parse HEAD)
    python -m benchmarks.moments --shape tiny --length 64 --device cpu        # does the script run?

One process, one model: both trainers change the same weights, one after the other. "update": seconds of
`optimizer.step()` over gradients that are there; "state": bytes that the optimizer keeps; "peak": of a whole step. A
part that fails is recorded, and the others go on; none is begun after `--time-limit` seconds. `--compiled` measures 8
bits once more with `torch.compile` around what decodes and encodes: what fused kernels would gain.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("FLAREC_CACHE_DIR", "off")

import torch

from flarec.bench.shapes import SHAPES, build
from flarec.bench.training.part import GIB, Steps, lowered, measured, stream
from flarec.bench.training.profile import seconds_of
from flarec.bench.training.shapes import RECIPES, PartPlan
from flarec.train.loop import Trainer
from flarec.train.moments import CodeTable

MOMENTS = ("float32", "8bit")


def measure(steps: Steps, moments: str, micro: int) -> dict[str, Any]:
    recipe = steps.recipe(micro).override([f"optimizer.moments={moments}"])
    trainer = Trainer(steps.program, recipe, steps.mask, stream(steps.plan, steps.model.config.vocab_size), seed=0)
    losses: list[float] = []

    def step() -> None:
        losses.append(float(trainer.advance().losses.sum()))

    try:
        found = measured(step, steps.plan)
        update = seconds_of(trainer.optimizer.step, 5)
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
        elements = sum(value.numel() for value in trainer.weights.optimized)
        state = sum(value.nbytes for value in states)
        return {**found, "update_seconds": update, "state_gib": state / GIB, "bytes_per_parameter": state / elements,
                "weights_gradients_moments_gib": trainer.weight_bytes / GIB, "losses": losses}
    finally:
        trainer.weights.forget()
        for parameter in steps.program.parameters().values():
            parameter.grad = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--shape", choices=[*SHAPES], default="2B")
    parser.add_argument("--part", choices=[*RECIPES], default="flare")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="off")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, default=60.0)
    options = parser.parse_args()
    start, cuda = time.monotonic(), options.device.startswith("cuda")
    plan = PartPlan(options.part, options.shape, options.device, options.rows, options.length, (options.micro,),
                    options.compile, quick=True)
    model = build(options.shape, options.device)
    steps = Steps(plan, model, *lowered(plan, model, *RECIPES[options.part]))
    found: dict[str, Any] = {}
    for name in (*MOMENTS, *(["8bit, compiled"] if options.compiled else [])):
        moments, _, compiled = name.partition(", ")
        if compiled:
            for call in ("decode", "encode"):
                setattr(CodeTable, call, torch.compile(getattr(CodeTable, call), dynamic=True))
        if time.monotonic() - start > options.time_limit:
            found[name] = {"error": "no time left"}
            continue
        try:
            found[name] = measure(steps, moments, options.micro)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        print(name, json.dumps(found[name]), flush=True)
    record = {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": " ".join(["python -m benchmarks.moments", *sys.argv[1:]]), "commit": options.commit,
        "seconds": round(time.monotonic() - start, 1), "moments": found,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(any("error" in one for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
