"""Elastic decoding on the bundled tiny model: causal, elastic and fixed blocks on the same weights.

    python benchmarks/elastic_tiny.py --out benchmarks/results/elastic-tiny-cpu.json

Converts with the recipe `fluid` at the demo's length, trains the horizon head on the same texts, and decodes held-out
tasks greedily. The head's say is the ablation: "gate alone" takes drafts by their own probability, "head alone" as many
as the head says, "fixed n" n drafts in every step. Diffusion-Trust is measured on the same weights, and on those of
`--denoise`. A row's threshold is chosen on one half of the tasks and reported on the other: the smallest one that keeps
`KEEPS` of causal decoding's accuracy there, or the most accurate one if none does. Without a recheck, which
`recheck_tiny.py` measures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flarec
from flarec.api import Model
from flarec.decode.cache import Cache
from flarec.decode.horizon import HorizonProgram
from flarec.evaluate import Example, evaluate, read_examples
from flarec.layout import Layout
from flarec.train.horizon.arguments import HeadArguments
from flarec.train.horizon.run import train_head
from flarec.train.progress import ConsoleReporter

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny"
THRESHOLDS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
WAYS = ("ar-trust", "elastic", "gate", "fixed", "diffusion-trust")
SURE = 50.0
"""Logits of a horizon that leaves no doubt."""
KEEPS = 0.95
TEXTS = TINY / "data" / "train.jsonl"


class FixedHorizon(HorizonProgram):
    """Says the same number everywhere, whatever the head says."""

    def __init__(self, wide: HorizonProgram, drafts: int) -> None:
        super().__init__(wide.program)
        self.drafts = drafts

    def step(self, input_ids: Tensor, layout: Layout, head_rows: Tensor, cache: Cache) -> Tensor:
        """As `HorizonProgram.step`."""
        rows = super().step(input_ids, layout, head_rows, cache)
        told = rows[:, self.vocab_size :]
        number = torch.full_like(told[:, 0], self.drafts).long()
        sure = SURE * F.one_hot(number, told.shape[1])
        return torch.cat([rows[:, : self.vocab_size], sure.to(rows.dtype)], dim=1)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=220, help="of the conversion")
    parser.add_argument("--rows", type=int, default=96, help="rows that the head learns from")
    parser.add_argument("--tasks", type=int, default=200, help="held-out tasks, half of them to choose on")
    parser.add_argument("--block", type=int, default=4, help="longest span")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default=None, help="commit of the tree, where git cannot tell")
    parser.add_argument("--thresholds", default=THRESHOLDS, type=_numbers, help="that are tried, with commas between")
    parser.add_argument("--ways", default=",".join(WAYS), help="what is measured beside causal decoding")
    parser.add_argument("--denoise", type=Path, nargs="*", default=[], help="checkpoints of Diffusion-Trust beside it")
    parser.add_argument("--keep", type=Path, default=None, help="directory of the checkpoints, which are used if there")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/elastic-tiny-cpu.json"))
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = options.keep or Path(folder)
        checkpoint = place / "elastic"
        if not checkpoint.is_dir():
            _convert(options, place)
        model = flarec.load(checkpoint, device=options.device, dtype="float32")
        rows, choosing = _measure(model, options)
        for other in options.denoise:
            denoiser = flarec.load(other, device=options.device, dtype="float32")
            more, seen = _denoised(denoiser, options, other.name)
            rows, choosing = rows + more, choosing | seen
        assert model.manifest is not None
        report = {
            "command": "python benchmarks/elastic_tiny.py " + " ".join(sys.argv[1:]),
            "commit": options.commit or _commit(),
            "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU",
            "versions": model.manifest.versions,
            "recipe": model.manifest.recipe,
            "head": {"data": model.manifest.data["horizon"], "held_out": model.manifest.metrics["horizon"]},
            "keeps": KEEPS,
            "rows": rows,
            "choosing": choosing,
            "seconds": time.perf_counter() - start,
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    _print(rows)


def _convert(options: argparse.Namespace, place: Path) -> None:
    """`plain`, converted with spans, and `elastic`, the same with a head, in a folder."""
    half = max(2, options.block // 2)
    keys = [
        f"diffusion.block_size={options.block}", f'diffusion.earlier_block_sizes=["2:0.25", "{half}:0.5"]',
        f"optimizer.steps={options.steps}", "optimizer.warmup_steps=10", "optimizer.batch_rows=4",
        "optimizer.micro_rows=4", "data.max_length=512", f"evaluation.every={options.steps}", *options.set,
    ]
    reporter = ConsoleReporter()
    flarec.convert(
        TINY / "model", [TEXTS], recipe="fluid", out=place / "plain", overrides=keys, device=options.device,
        seed=options.seed, overwrite=True, reporter=reporter,
    )
    train_head(
        HeadArguments(
            checkpoint=str(place / "plain"), data=(str(TEXTS),), out=place / "elastic", rows=options.rows,
            device=options.device, seed=options.seed, held_out=32,
        ),
        reporter,
    )


def _measure(model: Model, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and what was seen on the tasks that chose."""
    choose, report = _halves(model, options.tasks)
    wide = model._horizon()
    size = model.engine.block_size
    assert size is not None
    rows, choosing = [], {}
    base = _decode(model, choose, "causal")
    choosing["causal"] = base
    rows.append({"name": "causal", **_decode(model, report, "causal")})
    wanted = options.ways.split(",")
    if "ar-trust" in wanted:
        rows.append({"name": "ar-trust", **_decode(model, report, "ar-trust")})
    ways = [
        ("elastic", "elastic, horizon head and gate", wide), ("gate", "elastic, gate alone", FixedHorizon(wide, size)),
    ]
    for way, name, program in ways:
        if way not in wanted:
            continue
        model.engine._horizon = lambda program=program: program
        seen = {threshold: _decode(model, choose, "elastic", threshold) for threshold in options.thresholds}
        choosing[name] = {str(threshold): row for threshold, row in seen.items()}
        threshold = _chosen(seen, base["accuracy"])
        rows.append({"name": name, "threshold": threshold, **_decode(model, report, "elastic", threshold)})
    if "fixed" in wanted:
        model.engine._horizon = lambda: wide
        rows.append({"name": "elastic, horizon head alone", "threshold": 0.0,
                     **_decode(model, report, "elastic", 0.0)})
    for drafts in range(1, size + 1) if "fixed" in wanted else ():
        fixed = FixedHorizon(wide, drafts)
        model.engine._horizon = lambda fixed=fixed: fixed
        rows.append({"name": f"fixed {drafts}", **_decode(model, report, "elastic", 0.0)})
    more, seen_too = _denoised(model, options, base=base) if "diffusion-trust" in wanted else ([], {})
    return rows + more, choosing | seen_too


def _halves(model: Model, tasks: int) -> tuple[list[Example], list[Example]]:
    """Tasks that choose, and tasks that are reported on."""
    examples = read_examples(TINY / "data" / "test.jsonl", model, limit=tasks)
    return examples[::2], examples[1::2]


def _denoised(
    model: Model, options: argparse.Namespace, name: str = "", base: dict[str, Any] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The same of Diffusion-Trust; `name` of another checkpoint, whose causal decoding counts then."""
    choose, report = _halves(model, options.tasks)
    title = f"diffusion-trust, {name}" if name else "diffusion-trust"
    base = base or _decode(model, choose, "causal")
    seen = {threshold: _decode(model, choose, "diffusion-trust", threshold) for threshold in options.thresholds}
    threshold = _chosen(seen, base["accuracy"])
    row = {"name": title, "threshold": threshold, **_decode(model, report, "diffusion-trust", threshold)}
    before = [{"name": f"causal, {name}", **_decode(model, report, "causal")}] if name else []
    return [*before, row], {title: {str(threshold): row for threshold, row in seen.items()}}


def _chosen(seen: dict[float, dict[str, Any]], base: float) -> float:
    """The smallest threshold that keeps enough of the accuracy, else the most accurate one."""
    good = [threshold for threshold, row in seen.items() if row["accuracy"] >= KEEPS * base]
    return min(good) if good else max(seen, key=lambda threshold: seen[threshold]["accuracy"])


def _decode(model: Model, tasks: Sequence[Example], mode: str, threshold: float | None = None) -> dict[str, Any]:
    short = [replace(task, ids=task.ids[:2], responses=((1, 2),)) for task in tasks]  # the loss is not of interest here
    result = evaluate(model, short, mode=mode, threshold=threshold, recheck=0.0, batch=len(tasks))
    found = {
        "tasks": len(tasks), "accuracy": result["accuracy"], "interval": list(result["accuracy_interval"]),
        "tokens_per_forward": result["tokens_per_forward"], "seconds": result["seconds"],
    }
    print(mode, threshold, found, flush=True)
    return found


def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _print(rows: Sequence[dict[str, Any]]) -> None:
    print("| decoding | threshold | accuracy | tokens per forward |\n|---|---|---|---|")
    for row in rows:
        low, high = row["interval"]
        print(
            f"| {row['name']} | {row.get('threshold', '')} | {row['accuracy']:.3f} ({low:.2f} to {high:.2f}) "
            f"| {row['tokens_per_forward']:.2f} |"
        )


if __name__ == "__main__":
    main()
