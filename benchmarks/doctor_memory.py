"""The main memory that `flarec doctor` predicts for training over what a process needs at most, on this CPU.

    python benchmarks/doctor_memory.py --out benchmarks/results/doctor-memory-cpu.json

Small models of several families take two optimizer steps over full rows in a process of their own, which says the most
that it had resident; the prediction is the report of the doctor for the same configuration, in another process. The
target is 15 % either way. What is counted are tensors, within 5 % of what torch allocates (`tests/doctor`); what the
C library keeps of memory that was freed is not, which is little where layers are computed again, because a conversion
then lets it give large blocks back.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from flarec.base.heap import give_back_large_blocks
from flarec.device import resident
from flarec.doctor import diagnose
from flarec.frontend.export import capture
from flarec.frontend.tiny import build_tiny
from flarec.passes import lower
from flarec.recipe import Recipe, load_recipe
from flarec.train.adapter import adapter_of, start_adapter
from flarec.train.data.packing import full_rows
from flarec.train.loop import Trainer
from flarec.train.mask_token import MaskToken

TARGET, BATCH = 0.15, 2
SHAPES = {
    "512": {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 8192},
    "1024": {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 16384},
}
CPU = torch.device("cpu")
FAMILIES, RECIPES, LENGTHS = ("qwen3_5_text", "kimi_linear"), ("flare", "draft", "adapter"), (256, 1024)
MEMORY = ("recompute", "keep")
EVERY = [("qwen3_5_text", "draft", "512", m, "1024") for m in MEMORY]
EVERY += [(f, r, str(n), m, "512") for m in MEMORY for n in LENGTHS for f in FAMILIES for r in RECIPES]


def chosen(recipe: str, memory: str) -> Recipe:
    """The recipe with as many rows at a time, and no evaluation."""
    rows = [f"optimizer.batch_rows={BATCH}", f"optimizer.micro_rows={BATCH}", "evaluation.every=0"]
    return load_recipe(recipe).override([*rows, f"train.memory={memory}"])


def measured(family: str, recipe: str, length: int, memory: str, width: str) -> int:
    """Bytes that this process had at most, after two steps."""
    trainer = trainer_of(family, recipe, length, memory, width)
    if memory == "recompute":
        give_back_large_blocks()  # as `flarec convert` does
    for _ in range(2):
        trainer.advance()
    return resident()[1]


def trainer_of(family: str, recipe: str, length: int, memory: str, width: str) -> Trainer:
    """As `flarec convert` has it, both programs lowered."""
    options = chosen(recipe, memory)
    program, adapter = capture(build_tiny(family, **SHAPES[width])), adapter_of(options)
    start_adapter(program, options, 0, lambda text: None)
    vector = adapter is not None
    train = lower(program, "train", mask_vector=vector, adapter=adapter)
    lower(program, "decode", mask_vector=vector, adapter=adapter)
    mask = MaskToken("vector", train.vocab_size) if vector else MaskToken("row", train.vocab_size - 1)
    return Trainer(train, options, mask, full_rows(length, BATCH), seed=0)


def predicted(family: str, recipe: str, length: int, memory: str, width: str) -> int:
    """Bytes that the doctor says."""
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(family, **SHAPES[width]).config.save_pretrained(folder)
        report = diagnose(folder, chosen(recipe, memory), length=length, batch=BATCH, device=CPU)
    assert report.convert is not None, report.reason or report.estimate_note
    print(json.dumps(dict(report.convert.parts)), file=sys.stderr)
    return report.convert.total


def in_a_process(part: str, case: Sequence[str]) -> int:
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, *case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=("measured", "predicted"), help=argparse.SUPPRESS)
    parser.add_argument("case", nargs="*", help="family, recipe, length, memory and width of one case, not all")
    options = parser.parse_args()
    if options.part:
        torch.set_num_threads(1)
        family, recipe, length, *rest = options.case
        print((measured if options.part == "measured" else predicted)(family, recipe, int(length), *rest))
        return 0
    results: list[dict[str, Any]] = []
    for case in [tuple(options.case)] if options.case else EVERY:
        told, had = (in_a_process(part, case) for part in ("predicted", "measured"))
        error = told / had - 1
        verdict = "met" if abs(error) <= TARGET else "MISSED"
        names = dict(zip(("family", "recipe", "length", "memory", "width"), case, strict=True))
        results.append({**names, "predicted": told, "measured": had, "error": error, "verdict": verdict})
        name = " ".join(case)
        print(f"{name:<46} {told / 1e9:6.2f} GB told, {had / 1e9:6.2f} GB had, {error:+.1%}: {verdict}", flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(record(results), indent=1) + "\n")
    return int(any(one["verdict"] == "MISSED" for one in results))


def record(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is known so far, and of what."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": f"{platform.machine()} CPU, 1 thread", "commit": done.stdout.strip(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()},
        "command": "python benchmarks/doctor_memory.py", "target": TARGET, "shapes": SHAPES, "rows": BATCH,
        "cases": list(results),
    }


if __name__ == "__main__":
    sys.exit(main())
