"""Which positions Diffusion-Trust commits, and in which order: by probability or by entropy, on the bundled tiny model.

    python benchmarks/entropy_tiny.py --checkpoint out/demo/checkpoint

--checkpoint: one of `make demo`. A position's confidence is the probability of its token, as decoding has it, or
`exp(-H)` of its row's distribution (one over its perplexity, in (0, 1], so that a threshold on it is one on the entropy
`H`). Commits go from the left, as decoding with the causal readout does, or to the most certain positions first,
wherever they stand. A threshold of `exp(-H)` is as strict as one of the probability where one other token has the rest.
Greedy, float32, on the tasks that choose in `flarec tune`; every way is compared with decoding as it is, task by task.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import flarec
from flarec import GenerationOptions
from flarec.api import Model
from flarec.decode.modes.diffusion_trust import DiffusionTrustMode
from flarec.decode.rows import Rows
from flarec.evaluate import Example, answered, read_examples
from flarec.evaluation.choice import Setting
from flarec.evaluation.summary import Attempt, compare, summarise
from flarec.tune import graded

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "tiny" / "data" / "test.jsonl"
WAYS = {"probability, from the left": (False, False), "entropy, from the left": (True, False),
        "entropy, most certain first": (True, True), "probability, most certain first": (False, True)}
"""(by entropy, in the order of confidence); the first one is how decoding is. At a threshold of 0 all are the same."""
SETTINGS = tuple(map(Setting, (0.9, 0.99, 0.999, 0.5, 0.9, 0.5), (0.0, 0.0, 0.0, 0.3, 0.3, 1.0)))
NUMBERS = ("answers", "correct", "accuracy", "accuracy_interval", "tokens_per_forward", "forwards")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, default=Path("out/demo/checkpoint"))
    parser.add_argument("--tasks", type=int, default=200, help="held-out tasks, about half of them to choose on")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/entropy-tiny-cpu.json"))
    options = parser.parse_args()
    start = time.perf_counter()
    model = flarec.load(options.checkpoint, dtype="float32")
    assert model.manifest is not None
    tasks = graded(read_examples(DATA, model, limit=options.tasks), model.engine.max_positions)["choosing"]
    report: dict[str, Any] = {
        "command": "python benchmarks/entropy_tiny.py " + " ".join(sys.argv[1:]), "commit": _commit(),
        "device": f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
        "versions": {"flarec": flarec.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "recipe": model.manifest.recipe, "decode": str(model.manifest.decode),
    }
    report["causal"], report["ways"] = _numbers(_decode(model, tasks, None)), {}
    base: dict[Setting, list[Attempt]] = {}
    for name, (entropy, certain) in WAYS.items():
        rows = []
        with _decoding(entropy, certain):
            for setting in SETTINGS:
                used = setting._replace(threshold=_as_strict(setting.threshold)) if entropy else setting
                attempts = _decode(model, tasks, used)
                beside = compare(attempts, base.setdefault(setting, attempts))
                rows.append({
                    "probability": setting.threshold, **used._asdict(), **_numbers(attempts),
                    "to_decoding_as_it_is": {name: beside[name] for name in ("equal_texts", "paired")},
                })
        report["ways"][name] = rows
        report["seconds"] = time.perf_counter() - start
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def _as_strict(probability: float) -> float:
    """exp(-H) of a row that gives one token this probability and another one the rest."""
    rest = 1 - probability
    return math.exp(probability * math.log(probability) + rest * math.log(rest))


@contextmanager
def _decoding(entropy: bool, certain: bool) -> Iterator[None]:
    """Diffusion-Trust with another confidence, or another order of commits."""
    choose = Rows.choose

    def by_entropy(
        rows: Rows, logits: Tensor, first: Tensor, *, confidence: bool = False, source: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        token, probability = choose(rows, logits, first, confidence=confidence, source=source)
        if not confidence:
            return token, probability
        assert source is None and not rows.sampling.sampled
        scores = logits.float() if rows.suppress is None else logits.float().masked_fill(rows.suppress, -torch.inf)
        return token, torch.exp(-torch.special.entr(scores.softmax(dim=-1)).sum(dim=-1))

    def most_certain(mode: DiffusionTrustMode, masked: Tensor, confidence: Tensor) -> Tensor:
        place = confidence.masked_fill(~masked, -1.0).argmax(dim=1, keepdim=True)
        return (confidence >= mode.threshold).scatter(1, place, True)

    with ExitStack() as stack:
        if entropy:
            stack.enter_context(mock.patch.object(Rows, "choose", by_entropy))
        if certain:
            stack.enter_context(mock.patch.object(DiffusionTrustMode, "_chosen", most_certain))
        yield


def _decode(model: Model, tasks: Sequence[Example], setting: Setting | None) -> list[Attempt]:
    options = GenerationOptions(mode="causal")
    if setting is not None:
        options = GenerationOptions(mode="diffusion-trust", threshold=setting.threshold, recheck=setting.recheck)
    found = answered(model, tasks, options, batch=len(tasks))
    print(setting, _numbers(found), flush=True)
    return found


def _numbers(attempts: list[Attempt]) -> dict[str, Any]:
    found = summarise(attempts, 1)
    return {name: found[name] for name in NUMBERS} | {"taken_back": found.get("taken_back", 0)}


def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()
