"""An optimizer step of an adapter against one of full fine-tuning, on the bundled tiny model.

    python benchmarks/adapter_step.py --out benchmarks/results/adapter-step.json --commit $(git rev-parse HEAD)

Both train on the same packed rows with the recipe of `make demo` (`draft`, blocks of 3), so that they see the same
unique tokens; their steps alternate in one process. Wall-clock and CPU seconds are medians over the steps after a
warm-up; the ratio is the median of the ratios of neighbouring steps, which other work on the machine moves less than
either side.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from flarec.train.loop import Trainer
from flarec.train.options import Options
from flarec.train.prepare import prepare
from flarec.train.progress import Reporter

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny"
WARM_UP = 3


def trainer(folder: str, name: str, overrides: list[str]) -> Trainer:
    """A run of the demo's recipe that is ready to train."""
    options = Options(
        source=str(TINY / "model"), data=(str(TINY / "data" / "train.jsonl"),), out=Path(folder) / name,
        recipe=str(TINY / "recipe.toml"), overrides=("evaluation.every=0", *overrides), device="cpu", kernels="torch",
    )
    return prepare(options, Reporter()).trainer


def timed(run: Trainer) -> tuple[float, float, int]:
    """(wall-clock seconds, CPU seconds, clean tokens) of one step."""
    start, used = time.perf_counter(), time.process_time()
    step = run.advance()
    return time.perf_counter() - start, time.process_time() - used, step.clean_tokens


def measure(full: Trainer, adapter: Trainer, steps: int) -> dict[str, Any]:
    rows: list[tuple[tuple[float, float, int], tuple[float, float, int]]] = []
    for number in range(WARM_UP + steps):
        pair = timed(full), timed(adapter)
        assert pair[0][2] == pair[1][2], "the same rows"
        if number >= WARM_UP:
            rows.append(pair)
    tokens = sum(one[2] for one, _ in rows)
    report: dict[str, Any] = {"steps": steps, "clean_tokens_per_step": tokens / steps}
    for index, name in enumerate(("wall", "cpu")):
        for side, kind in enumerate(("full", "adapter")):
            report[f"{kind}_{name}_seconds"] = statistics.median(row[side][index] for row in rows)
        report[f"{name}_ratio"] = statistics.median(other[index] / one[index] for one, other in rows)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for the adapter's recipe")
    parser.add_argument("--profile", action="store_true", help="print where an adapter's step spends its time")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        full = trainer(folder, "full", [])
        overrides = [f"adapter.rank={options.rank}", "objective.ar_weight=0", *options.set]
        adapter = trainer(folder, "adapter", overrides)
        report = measure(full, adapter, options.steps)
        if options.profile:
            show_profile(adapter)
    report |= {
        "command": "python benchmarks/adapter_step.py " + " ".join(sys.argv[1:]), "commit": options.commit,
        "rank": options.rank, "threads": options.threads, "load": os.getloadavg()[0],
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def show_profile(run: Trainer, steps: int = 3) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            run.advance()
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=35, max_name_column_width=60))


if __name__ == "__main__":
    main()
