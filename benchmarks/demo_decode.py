"""Seconds of decoding with the checkpoint of `make demo`, mode by mode, by how many requests run at a time (CPU).

    python benchmarks/demo_decode.py out/demo/checkpoint --out benchmarks/results/demo-decode-cpu.json

Held-out tasks, greedy. Programs are lowered before the clock starts; prompts are read in the time. Ways take turns: the
ratio of a way to causal decoding of the same tasks is the middle one of its turns, each against causal in that turn.
What `auto` has learnt in one turn it knows in the next.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import flarec
from flarec.evaluate import to_examples

TASKS = Path(__file__).parent.parent / "examples" / "tiny" / "data" / "test.jsonl"
SIZES = ((1, 8), (8, 48), (200, 200))
"""Requests at a time, and tasks."""
WAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("causal", {"mode": "causal"}),
    ("ar-trust, branches", {"mode": "ar-trust", "drafts": "branches"}),
    ("ar-trust, single", {"mode": "ar-trust", "drafts": "single"}),
    ("ar-trust, auto", {"mode": "ar-trust", "drafts": "auto"}),
    ("diffusion-trust", {"mode": "diffusion-trust"}),
)
NEW_TOKENS = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = flarec.load(options.checkpoint, device="cpu")
    with TASKS.open(encoding="utf-8") as lines:
        prompts = [example.prompt for example in to_examples([json.loads(line) for line in lines], model)]
    rows = []
    for batch, tasks in SIZES:
        seconds: dict[str, list[float]] = {name: [] for name, _ in WAYS}
        rates: dict[str, list[float]] = {name: [] for name, _ in WAYS}
        for _, keywords in WAYS:
            model.generate_ids(prompts[:2], max_new_tokens=8, batch=batch, **keywords)
        for _ in range(options.turns):
            for name, keywords in WAYS:
                start = time.perf_counter()
                answers = model.generate_ids(prompts[:tasks], max_new_tokens=NEW_TOKENS, batch=batch, **keywords)
                seconds[name].append(time.perf_counter() - start)
                tokens, forwards = (sum(map(count, answers)) for count in (
                    lambda answer: len(answer.token_ids), lambda answer: answer.forwards))
                rates[name].append(tokens / forwards)
        for name, _ in WAYS:
            ratios = [own / causal for own, causal in zip(seconds[name], seconds["causal"], strict=True)]
            rows.append({
                "requests": batch, "tasks": tasks, "way": name,
                "tokens_per_forward": round(statistics.median(rates[name]), 3),
                "seconds": round(statistics.median(seconds[name]), 2), "to_causal": round(statistics.median(ratios), 3),
                "turns": [round(ratio, 3) for ratio in ratios],
            })
            print(rows[-1], flush=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TASKS.parent, capture_output=True, text=True, check=False)
    record = {
        "command": " ".join(["python benchmarks/demo_decode.py", *sys.argv[1:]]), "commit": head.stdout.strip() or None,
        "device": f"{platform.machine()} CPU, {options.threads} threads",
        "versions": {"flarec": flarec.__version__, "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
