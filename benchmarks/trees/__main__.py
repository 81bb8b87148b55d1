"""Would a tree over the drafts beat one block per outcome? From the drafts along answers, by exact simulation.

    python -m benchmarks.trees CKPT --prompts examples/tiny/data/test.jsonl --limit 128 --out trees.json

The engine writes causal answers; a noisy block at every place of them gives all drafts (`tables`); decoding is walked
along them in every shape (`walk`, `shapes`). Checked in the same run: forwards of one block per outcome, and of one
block, are the engine's. Everything of a step counts as a row: drafts, blocks behind branches, rows that are fed again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

import flarec
from flarec.api import Model
from flarec.bench.report import versions
from flarec.evaluation.loops import loops

from .judge import Measured
from .shapes import BUDGETS, Costs, shapes
from .tables import CANDIDATES, Answer, Measurement
from .walk import MASKED, MIXED, Key, Shape, Table, Walk, complete, walk

ROOT = Path(__file__).parents[2]
OUTCOMES = "one block per outcome"
RESAMPLES = 400
BRANCHED = 8


def prompts_of(path: Path, model: Model, limit: int, seed: int) -> list[list[int]]:
    """Token ids of prompts: of records with "prompt", or with "messages", of which the last is the answer."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(seed).shuffle(records)
    texts = [record["prompt"] if "prompt" in record else record["messages"][:-1] for record in records[:limit]]
    return [model.encode(text, chat=True) for text in texts]


def answered(
    model: Model, prompts: list[list[int]], heat: float, seed: int, options: argparse.Namespace
) -> list[Answer]:
    """Causal answers of at least two tokens."""
    found = model.generate_ids(
        prompts, mode="causal", temperature=heat, seed=seed, max_new_tokens=options.new_tokens, batch=options.batch
    )
    pairs = zip(prompts, found, strict=True)
    answers = [Answer(prompt, Table(one.token_ids), heat, seed) for prompt, one in pairs if one.new_tokens > 1]
    if options.loop_free:
        answers = [answer for answer in answers if not loops(answer.table.answer)]
    return answers


def check(model: Model, answers: list[Answer], size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The engine's forwards beside those of the walks. texts: answers that are the causal ones; other_forwards: of
    these, those with another number of forwards."""
    found = []
    for drafts in ("branches", "single"):
        for block in (size, size - 1)[: 1 + (drafts == "branches" and size > 1)]:
            model.engine.block_size = block
            outputs = model.generate_ids(
                [answer.prompt for answer in answers], mode="ar-trust", drafts=drafts, batch=options.batch,
                temperature=answers[0].temperature, seed=answers[0].seed, max_new_tokens=options.new_tokens,
            )
            model.engine.block_size = size
            shape = Shape(drafts, block, block, branches=drafts == "branches")
            walks = [walk(answer.table, shape) for answer in answers]
            same = [
                (one.forwards, ours.forwards) for answer, one, ours in zip(answers, outputs, walks, strict=True)
                if one.token_ids == list(answer.table.answer)
            ]
            found.append({
                "drafts": drafts, "block": block, "texts": len(same), "of": len(answers),
                "other_forwards": sum(one != ours for one, ours in same),
                "engine": sum(one.new_tokens for one in outputs) / sum(one.forwards for one in outputs),
                "walk": rate(walks),
            })
    return found


def branches(measurement: Measurement, answers: list[Answer]) -> dict[str, int]:
    """Blocks whose first row holds the answer's token with the clean stream's weights: at how many places that row
    chooses what the clean stream does, and the rows behind it draft what a masked block behind the token drafts."""
    wanted = [
        [Key(MIXED, place, token) for place, token in enumerate(answer.table.answer[:-2])] for answer in answers
    ]
    measurement.fill(answers, wanted)
    found = {"places": 0, "same choice": 0, "same drafts": 0}
    for answer, keys in zip(answers, wanted, strict=True):
        for key in keys:
            first, *drafts = [slot.tokens[0] for slot in answer.table.drafts(key)]
            found["places"] += 1
            found["same choice"] += first == answer.table.answer[key.place + 1]
            behind = answer.table.drafts(Key(MASKED, key.place + 1))
            found["same drafts"] += drafts == [slot.tokens[0] for slot in behind]
    return found


def rate(walks: Sequence[Walk]) -> float:
    """Tokens per forward."""
    return sum(one.tokens for one in walks) / sum(one.forwards for one in walks)


def compare(answers: list[Answer], size: int, options: argparse.Namespace) -> dict[str, Any]:
    """All shapes over the answers of one temperature and seed. What is believed of a half comes from the other half;
    of a family, the shape that is best in one half within a number of rows is reported on the other, both ways."""
    costs, families, judges = options.costs, shapes(size), judged(answers, size)
    walks: dict[Shape, list[Walk]] = {}
    for shape in (shape for found in families.values() for shape in found):
        some = answers[: options.shown] if shape.show else answers
        walks[shape] = [walk(answer.table, shape, judge) for answer, judge in zip(some, judges, strict=False)]

    def best(family: str, cost: Callable[[Shape], float], most: float) -> dict[int, Shape]:
        """By request: the shape that the other half chose."""
        chosen: dict[int, Shape] = {}
        fits = [shape for shape in families[family] if shape.rows <= most and len(walks[shape]) > 1]
        for half in (0, 1) if fits else ():
            pick = max(fits, key=lambda shape: rate(walks[shape][1 - half :: 2]) / cost(shape))
            chosen |= dict.fromkeys(range(half, len(walks[pick]), 2), pick)
        return chosen

    def cost_of(requests: int) -> Callable[[Shape], float]:
        return lambda shape: costs.milliseconds(shape.rows, requests)

    def against(cost: Callable[[Shape], float], most: float) -> dict[str, Any]:
        base = best(OUTCOMES, cost, most)
        found = {family: best(family, cost, most) for family in families}
        return {family: _against(chosen, base, walks, cost) for family, chosen in found.items() if chosen}

    every = {
        family: [
            {"shape": shape.name, "rows": shape.rows, "tokens_per_forward": rate(walks[shape]),
             "branched": _share(walks[shape], "branched"), "gained": _share(walks[shape], "gained")}
            for shape in found if walks[shape]
        ]
        for family, found in families.items()
    }
    return {
        "by_rows": {str(budget): against(lambda shape: 1.0, budget) for budget in BUDGETS},
        "by_cost": {str(requests): against(cost_of(requests), 1e9) for requests in costs.requests},
        "shapes": every,
    }


def judged(answers: list[Answer], size: int) -> list[Measured]:
    """By answer: what the other half of them says."""
    halves = [Measured([answer.table for answer in answers[half::2]], size, CANDIDATES) for half in (0, 1)]
    return [halves[1 - number % 2] for number in range(len(answers))]


def _share(walks: Sequence[Walk], name: str) -> float:
    """Of a step that is not the prompt's."""
    return sum(getattr(one, name) for one in walks) / max(1, sum(one.forwards - 1 for one in walks))


def _against(
    found: dict[int, Shape], base: dict[int, Shape], walks: dict[Shape, list[Walk]], cost: Callable[[Shape], float]
) -> dict[str, Any]:
    """Tokens per forward (or per millisecond) of the shapes, and to the others' on the same requests, with standard
    errors by resampling requests."""
    count = len(found)
    draw = numpy.random.default_rng(0).multinomial(count, [1 / count] * count, RESAMPLES)
    values = []
    for chosen in (found, base):
        own = [(chosen[number], walks[chosen[number]][number]) for number in sorted(found)]
        tokens = numpy.array([one.tokens for _, one in own])
        spent = numpy.array([one.forwards * cost(shape) for shape, one in own])
        values.append((tokens.sum() / spent.sum(), (draw @ tokens) / (draw @ spent)))
    (value, many), (other, others) = values
    return {
        "requests": count, "value": float(value), "error": float(many.std()), "ratio": float(value / other),
        "ratio_error": float((many / others).std()), "shapes": sorted({shape.name for shape in found.values()}),
        "rows": sorted({shape.rows for shape in found.values()}),
    }


def measure(
    model: Model, prompts: list[list[int]], heat: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    assert model.manifest is not None
    size, start = model.manifest.decode.block_size, time.monotonic()
    answers = answered(model, prompts, heat, seed, options)
    measurement = Measurement(model, size + 1, options.rows)
    measurement.begin(answers)
    told = time.monotonic()
    shown = [shape for found in shapes(size).values() for shape in found if shape.show]
    some, judges, rounds = answers[: options.shown], judged(answers, size), 0
    for wanted in complete([answer.table for answer in some], shown, judges):
        measurement.fill(some, wanted)
        rounds += 1
    filled = time.monotonic()
    found = {
        "temperature": heat, "seed": seed, "answers": len(answers),
        "tokens": sum(len(answer.table.answer) for answer in answers),
        "said": sum(answer.said for answer in answers) / sum(len(answer.table.answer) for answer in answers),
        "instead": judges[0].instead_shares, "rounds": rounds,
        "check": check(model, answers, size, options), "branches": branches(measurement, answers[:BRANCHED]),
        **compare(answers, size, options),
    }
    found["seconds"] = [round(told - start, 1), round(filled - told, 1), round(time.monotonic() - filled, 1)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trees", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", nargs="+")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--seeds", type=int, default=1, help="of sampling, at temperatures above 0")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--batch", type=int, default=64, help="requests of the engine at a time")
    parser.add_argument("--rows", type=int, default=4096, help="of a forward over whole answers")
    parser.add_argument("--shown", type=int, default=10**9, help="answers along which tokens are shown in blocks")
    parser.add_argument("--loop-free", action="store_true", help="without answers that run in circles")
    parser.add_argument("--costs", type=Path, default=ROOT / "benchmarks" / "results" / "decode-h200-b8568ba.json")
    parser.add_argument("--time-limit", type=float, default=1e9, metavar="S", help="begin no run after S seconds")
    parser.add_argument("--commit", help="of the tree, where git cannot tell")
    options, start = parser.parse_args(), time.monotonic()
    command = "python -m benchmarks.trees " + " ".join(sys.argv[1:])
    commit = options.commit or subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    options.costs = Costs(options.costs)
    table: dict[str, Any] = {"command": command, "commit": commit, "versions": versions(), "runs": []}
    for path in options.checkpoint:
        model = flarec.load(
            path, device=options.device, dtype=options.dtype, kernels=options.kernels, graphs="off", compile="off"
        )
        device = model.program.device
        threads = f"CPU, {torch.get_num_threads()} threads"
        table["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
        prompts = prompts_of(options.prompts, model, options.limit, 0)
        for heat in options.temperatures:
            for seed in range(options.seeds if heat > 0 else 1):
                if time.monotonic() - start > options.time_limit:
                    continue
                run = {"checkpoint": Path(path).name, **measure(model, prompts, heat, seed, options)}
                table["runs"].append(run)
                options.out.write_text(json.dumps(table, indent=1) + "\n")
                show(run)


def show(run: dict[str, Any]) -> None:
    print(f"{run['checkpoint']}, T = {run['temperature']:g}, seed {run['seed']}: {run['answers']} answers, "
          f"{run['seconds']} s, {run['rounds']} rounds; instead {run['instead']}")
    for row in run["check"]:
        print(f"  engine, {row['drafts']}, blocks of {row['block']}: {row['engine']:.4f}, walk {row['walk']:.4f}, "
              f"{row['other_forwards']} of {row['texts']} differ, {row['of']} answers")
    print(f"  branches: {run['branches']}")
    for name in ("by_rows", "by_cost"):
        for limit, families in run[name].items():
            print(f"  {name} {limit}")
            for family, row in families.items():
                print(f"    {family:<52} {row['value']:.3f} +- {row['error']:.3f}, ratio {row['ratio']:.3f} +- "
                      f"{row['ratio_error']:.3f}, rows {row['rows']}, {row['shapes']}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
