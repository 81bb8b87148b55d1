"""A recheck on the bundled tiny model: Diffusion-Trust and elastic decoding over thresholds and shares.

    python benchmarks/recheck_tiny.py --demo out/demo/checkpoint --elastic out/elastic/keep/elastic

--demo: a checkpoint of `make demo`, for Diffusion-Trust; --elastic: one of `benchmarks/elastic_tiny.py --keep`, for
elastic decoding. Greedy unless --temperature is given, float32. Every pair of threshold and share is measured on one
half of the held-out tasks; of each mode, with and without a recheck, the pair is reported on the other half that has
most tokens per forward among those that keep `KEEPS` of causal decoding's accuracy (the most accurate one if none
does). A share of 1 gives the text of causal decoding, which is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import flarec
from flarec.api import Model
from flarec.evaluate import Example, assess, read_examples
from flarec.evaluation.statistics import paired
from flarec.evaluation.summary import Attempt, rates

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "tiny" / "data" / "test.jsonl"
PLAIN = {"diffusion-trust": (0.9, 0.999), "elastic": (0.9, 0.97, 0.999)}
"""Thresholds without a recheck: the range of docs/quality.md."""
THRESHOLDS = (0.0, 0.5, 0.9)
SHARES = (0.1, 0.3, 0.6, 1.0)
KEEPS = 0.97
Pair = tuple[float, float]
"""Threshold and share."""


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--demo", type=Path, default=None, help="checkpoint whose Diffusion-Trust is measured")
    parser.add_argument("--elastic", type=Path, default=None, help="checkpoint whose elastic decoding is measured")
    parser.add_argument("--tasks", type=int, default=200, help="held-out tasks, half of them to choose on")
    parser.add_argument("--thresholds", default=THRESHOLDS, type=_numbers, help="that are tried, with commas between")
    parser.add_argument("--shares", default=SHARES, type=_numbers, help="of the recheck, with commas between")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recheck-tiny-cpu.json"))
    options = parser.parse_args()
    start = time.perf_counter()
    report: dict[str, Any] = {
        "command": "python benchmarks/recheck_tiny.py " + " ".join(sys.argv[1:]), "commit": _commit(),
        "device": f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
        "versions": {"flarec": flarec.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "keeps": KEEPS, "modes": {},
    }
    for mode, place in (("diffusion-trust", options.demo), ("elastic", options.elastic)):
        if place is not None:
            report["modes"][mode] = _measured(flarec.load(place, dtype="float32"), mode, options)
            report["seconds"] = time.perf_counter() - start
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")


def _measured(model: Model, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one checkpoint: its recipe, all pairs on the half that chooses, some on the other one."""
    assert model.manifest is not None
    heat = options.temperature
    examples = read_examples(DATA, model, limit=options.tasks)
    choose, reported = examples[::2], examples[1::2]
    pairs = [(threshold, 0.0) for threshold in PLAIN[mode]]
    pairs += [(threshold, share) for share in options.shares for threshold in options.thresholds]
    found: dict[str, Any] = {"recipe": model.manifest.recipe, "decode": str(model.manifest.decode)}
    base, own = _decode(model, choose, "causal", heat)
    seen: dict[Pair, dict[str, Any]] = {}
    for pair in pairs:
        row, attempts = _decode(model, choose, mode, heat, pair)
        row["equal_texts"] = _equal(attempts, own)
        assert pair[1] != 1 or row["equal_texts"] == len(choose), "a share of 1 is causal decoding"
        seen[pair] = row
    found["choosing"] = {"causal": base, "pairs": [{**_named(pair), **row} for pair, row in seen.items()]}
    base, own = _decode(model, reported, "causal", heat)
    trusted, _ = _decode(model, reported, "ar-trust", heat)
    rows: dict[str, Any] = {"causal": base, "ar-trust": trusted}
    for name, part in (
        ("without a recheck", [pair for pair in seen if not pair[1]]),
        ("with a recheck", [pair for pair in seen if pair[1]]),
        ("exact", [pair for pair in seen if pair[1] == 1]),
    ):
        if part:
            pair = _chosen({pair: seen[pair] for pair in part}, found["choosing"]["causal"]["accuracy"])
            row, attempts = _decode(model, reported, mode, heat, pair)
            against = paired(list(rates(attempts).values()), list(rates(own).values()))
            rows[name] = {**_named(pair), **row, "equal_texts": _equal(attempts, own),
                          "to_causal": {"better": against.better, "worse": against.worse, "low": against.low,
                                        "high": against.high, "p_value": against.p_value}}
    found["reported"] = rows
    return found


def _named(pair: Pair) -> dict[str, float]:
    return {"threshold": pair[0], "recheck": pair[1]}


def _equal(attempts: Sequence[Attempt], others: Sequence[Attempt]) -> int:
    """Answers of the same tokens."""
    return sum(one.token_ids == other.token_ids for one, other in zip(attempts, others, strict=True))


def _chosen(seen: dict[Pair, dict[str, Any]], base: float) -> Pair:
    """The pair with most tokens per forward among those that keep enough, else the most accurate one."""
    good = [pair for pair, row in seen.items() if row["accuracy"] >= KEEPS * base]
    if good:
        return max(good, key=lambda pair: float(seen[pair]["tokens_per_forward"]))
    return max(seen, key=lambda pair: float(seen[pair]["accuracy"]))


def _decode(
    model: Model, tasks: Sequence[Example], mode: str, temperature: float, pair: Pair | None = None
) -> tuple[dict[str, Any], list[Attempt]]:
    short = [replace(task, ids=task.ids[:2], responses=((1, 2),)) for task in tasks]  # the loss is not of interest here
    options = flarec.GenerationOptions(mode=mode, temperature=temperature)
    if pair is not None:
        options = replace(options, threshold=pair[0], recheck=pair[1])
    start = time.process_time()
    result, attempts = assess(model, short, options, batch=len(tasks))
    found = {
        "tasks": len(tasks), "accuracy": result["accuracy"], "interval": list(result["accuracy_interval"]),
        "tokens_per_forward": result["tokens_per_forward"], "forwards": result["forwards"],
        "taken_back": result.get("taken_back", 0), "cpu_seconds": time.process_time() - start,
    }
    print(mode, pair, found, flush=True)
    return found, attempts


def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()
