"""What an arm is measured by: loss of held-out text, drafts of AR-Trust, structured tasks in causal decoding and in
Diffusion-Trust."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ladder.data import records
from flarec.api import Model, Output
from flarec.evaluate import response_loss, to_examples
from flarec.evaluation.loops import loops

THRESHOLDS = (0.7, 0.9, 0.97, 0.99)
PROMPT_TOKENS = 48


@dataclass(frozen=True)
class Sizes:
    """How much is measured: texts of the loss, prompts and their new tokens, tasks of either half."""

    texts: int = 192
    prompts: int = 128
    new_tokens: int = 64
    tasks: int = 96
    batch: int = 128


def measured(model: Model, data: Path, sizes: Sizes, modes: tuple[str, ...]) -> dict[str, Any]:
    """Everything of one checkpoint. modes: those that it decodes in, of causal, ar-trust, diffusion-trust."""
    start = time.perf_counter()
    found: dict[str, Any] = {"loss": text_loss(model, data, sizes)}
    report = records(data / "tasks-report.jsonl.gz", sizes.tasks)
    found["causal"] = solved(model, report, sizes, mode="causal")
    if "ar-trust" in modes:
        found["ar-trust"] = {
            "T=0": drafted(model, data, sizes, 0.0), "T=1": drafted(model, data, sizes, 1.0),
            "T=0 single": drafted(model, data, sizes, 0.0, drafts="single"),
            "tasks": solved(model, report, sizes, mode="ar-trust"),
        }
    if "diffusion-trust" in modes:
        choose = records(data / "tasks-choose.jsonl.gz", sizes.tasks)
        found["diffusion-trust"] = {
            name: {
                str(value): solved(model, tasks, sizes, mode="diffusion-trust", threshold=value, recheck=0.0)
                for value in THRESHOLDS
            }
            for name, tasks in (("choose", choose), ("report", report))
        }
        found["causal choose"] = solved(model, choose, sizes, mode="causal")
    return {**found, "measure_seconds": round(time.perf_counter() - start, 1)}


def text_loss(model: Model, data: Path, sizes: Sizes) -> dict[str, float]:
    """Nats per token of held-out texts, and of the answers of held-out tasks, on the clean stream."""
    found = {}
    for kind, name in (("text", "text-report"), ("tasks", "tasks-report")):
        examples = to_examples(records(data / f"{name}.jsonl.gz", sizes.texts), model)
        total, count = response_loss(model, examples, 32)
        found[kind] = total / count
    return found


def drafted(model: Model, data: Path, sizes: Sizes, temperature: float, **options: Any) -> dict[str, Any]:
    """Tokens and forwards of AR-Trust that goes on with held-out texts; without answers that run in circles, too."""
    texts = [record["text"] for record in records(data / "text-report.jsonl.gz")[-sizes.prompts :]]
    prompts = [model.encode(text)[:PROMPT_TOKENS] for text in texts]
    outputs = model.generate_ids(
        prompts, mode="ar-trust", temperature=temperature, max_new_tokens=sizes.new_tokens, batch=sizes.batch, **options
    )
    free = [output for output in outputs if not loops(output.token_ids)]
    return {"all": _counts(outputs), "loop-free": _counts(free)}


def _counts(outputs: list[Output]) -> dict[str, Any]:
    return {
        "prompts": len(outputs), "tokens": sum(output.new_tokens for output in outputs),
        "forwards": sum(output.forwards for output in outputs),
    }


def solved(model: Model, tasks: list[dict[str, Any]], sizes: Sizes, **options: Any) -> dict[str, Any]:
    """Right answers, greedily, by kind of task, and tokens and forwards."""
    prompts = [model.encode(task["prompt"]) for task in tasks]
    longest = max(len(model.encode(task["response"])) for task in tasks) + 8
    outputs = model.generate_ids(prompts, max_new_tokens=longest, batch=sizes.batch, **options)
    right: Counter[str] = Counter()
    for task, output in zip(tasks, outputs, strict=True):
        right[task["kind"]] += output.text.strip() == task["response"]
    return {**_counts(outputs), "right": sum(right.values()), "right_by_kind": dict(sorted(right.items()))}
