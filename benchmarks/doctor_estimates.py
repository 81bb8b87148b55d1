"""The times that `flarec doctor` predicts over those that are measured, in one run on this CPU.

    python benchmarks/doctor_estimates.py [--out results.json] [--family qwen3_5_text] [--repeats 8] [--threads 1]

A small model takes real training steps and real steps of decoding; prediction is the counted work at the rates of the
doctor's micro-benchmark, which runs before and after them. The target is a factor of two either way. Seconds are those
of the processor, the best of the repeats: other work on the machine is not the model's.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from flarec.decode import BlockSpec, Cache, Stepper
from flarec.doctor.rates import measure, seconds_of
from flarec.doctor.report import Rates
from flarec.doctor.simulate import Work
from flarec.doctor.steps import decode_step, simulate_serving, simulate_training
from flarec.frontend.export import capture
from flarec.frontend.tiny import build_tiny
from flarec.ir.program import Program
from flarec.passes import lower
from flarec.recipe import load_recipe
from flarec.train.data.packing import full_rows
from flarec.train.loop import Trainer
from flarec.train.mask_token import MaskToken

TARGET = 2.0
LENGTH, BATCH, WIDTH = 128, 2, 256
POSITIONS, BLOCK = 200, 4
CPU = torch.device("cpu")
RECIPE = load_recipe("flare").override([f"optimizer.batch_rows={BATCH}", f"optimizer.micro_rows={BATCH}"])


def fastest(step: Callable[[], object], repeats: int) -> float:
    """Processor seconds of the best of the repeats, behind one that warms up."""
    step()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return min(seconds)


def steps(program: Program, repeats: int) -> dict[str, tuple[Work, float]]:
    """Counted work and measured seconds of a training step and of the steps of decoding."""
    train, decode = lower(program, "train"), lower(program, "decode")
    training = simulate_training(train, RECIPE, length=LENGTH, batch=BATCH, device=CPU)
    rows = full_rows(LENGTH, BATCH)
    trainer = Trainer(lower(program, "train"), RECIPE, MaskToken("row", program.vocab_size - 1), rows, seed=0)
    found = {"training step": (training.micro_batch + training.update, fastest(trainer.advance, repeats))}
    serving = simulate_serving(decode, length=POSITIONS, batch=BATCH, block_size=BLOCK, device=CPU)
    drafts = list(range(1, BLOCK + 2))
    for name, clean, anchors in (("causal", 1, []), ("AR-Trust", BLOCK + 1, drafts), ("Diffusion-Trust", 0, [0])):
        cache = Cache.allocate(decode.cache_slots, BATCH, POSITIONS, CPU)
        cache.length = torch.full((BATCH,), POSITIONS // 2)
        stepper = Stepper(decode, cache, BlockSpec(BLOCK, BLOCK, "causal", 0))

        def step(stepper: Stepper = stepper, clean: int = clean, anchors: list[int] = anchors) -> None:
            decode_step(stepper, clean, anchors)

        with torch.no_grad():
            found[name] = (serving.steps[name], fastest(step, repeats))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted over measured times of flarec doctor.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--family", default="qwen3_5_text")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    program = capture(build_tiny(options.family, hidden_size=WIDTH, intermediate_size=2 * WIDTH, vocab_size=2048))
    rates: list[Rates] = [measure(CPU, torch.float32, WIDTH)]
    measured = steps(program, options.repeats)
    rates.append(measure(CPU, torch.float32, WIDTH))
    results: dict[str, Any] = {}
    for name, (work, seconds) in measured.items():
        ratios = [seconds_of(work, rate) / seconds for rate in rates]
        verdict = "met" if all(1 / TARGET < ratio < TARGET for ratio in ratios) else "MISSED"
        results[name] = {"measured seconds": seconds, "predicted over measured": ratios}
        told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name:<16} {1e3 * seconds:8.1f} ms, predicted over measured {told} (target {TARGET}): {verdict}")
    if options.out is not None:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        record = {
            "device": f"CPU, {options.threads} threads",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                         "python": platform.python_version()},
            "command": f"python benchmarks/doctor_estimates.py --family {options.family} --repeats {options.repeats} "
                       f"--threads {options.threads}",
            "commit": done.stdout.strip(),
            "steps": results,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
