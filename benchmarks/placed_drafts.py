"""`--drafts auto` and `--drafts horizon`, on the bundled tiny model: tokens per forward and per CPU second.

    python benchmarks/elastic_tiny.py --keep out/elastic ...        # makes the checkpoint
    python benchmarks/placed_drafts.py --checkpoint out/elastic/elastic --out benchmarks/results/placed-tiny-cpu.json

The head says behind which rows the next blocks stand (`flarec/decode/ends.py`). How many blocks there may be is chosen
on one half of the held-out tasks, for every number of requests at a time; the other half is reported. Causal decoding
and whole branches are beside it. Ways take turns on the same tasks, so that a slow moment is everybody's, and seconds
are those of this process alone, on one thread: the policy's clock, too. Texts are compared with causal decoding's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import flarec
import flarec.decode.graphs
import flarec.decode.rows
from flarec.api import Model
from flarec.decode.policy import Drafting, DraftPolicy, choices_of
from flarec.evaluate import read_examples

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "examples" / "tiny" / "data" / "test.jsonl"
PLACED: dict[str, tuple[int, ...]] = {
    "auto": (), "horizon, 1": (1,), "horizon, 2": (2,), "horizon, 1 or 2": (1, 2), "horizon, 1 to 3": (1, 2, 3),
}
"""Ways with the policy, and the numbers of placed blocks that it may choose."""


class Counted(DraftPolicy):
    """Counts what it chooses."""

    def __init__(self, choices: tuple[Drafting, ...]) -> None:
        super().__init__(choices)
        self.used: Counter[Drafting] = Counter()

    def next(self, rows: int) -> Drafting:
        drafting = super().next(rows)
        self.used[drafting] += 1
        return drafting


class Way:
    """One way to decode, with what it has learned and used."""

    def __init__(self, model: Model, name: str, width: int) -> None:
        self.model, self.name, self.width = model, name, width
        self.placed = PLACED.get(name)
        blocks = model.engine._blocks("ar-trust")
        self.policy = Counted(choices_of(blocks.size, blocks.readout, self.placed or ()))
        self.tokens = self.forwards = 0
        self.seconds: list[float] = []
        self.texts: dict[int, list[int]] = {}

    def decode(self, numbers: list[int], prompts: list[list[int]], new_tokens: int) -> None:
        engine = self.model.engine
        engine.__dict__["_policy"] = lambda key, placed=(): self.policy
        mode = "causal" if self.name == "causal" else "ar-trust"
        drafts = "branches" if self.placed is None else "horizon" if self.placed else "auto"
        start = time.process_time()
        outputs = self.model.generate_ids(
            prompts, mode=mode, drafts=drafts, max_new_tokens=new_tokens, batch=self.width
        )
        self.seconds.append(time.process_time() - start)
        self.tokens += sum(output.new_tokens for output in outputs)
        self.forwards += sum(output.forwards for output in outputs)
        self.texts |= {number: output.token_ids for number, output in zip(numbers, outputs, strict=True)}

    def row(self, causal: Way) -> dict[str, Any]:
        """Its line of the table. against: seconds of causal decoding to its own, turn by turn."""
        ratios = [plain / own for plain, own in zip(causal.seconds, self.seconds, strict=True)]
        used = {f"{d.size}x{'branches' if d.branches and d.size else d.placed}": n for d, n in self.policy.used.items()}
        return {
            "name": self.name, "requests": self.width, "tokens": self.tokens,
            "tokens_per_forward": self.tokens / self.forwards, "tokens_per_second": self.tokens / sum(self.seconds),
            "to_causal": sum(causal.seconds) / sum(self.seconds), "to_causal_by_turn": ratios,
            "steps": dict(sorted(used.items())), "misses_left_by_head": self.policy.ends.left,
            "other_texts": sum(self.texts[number] != text for number, text in causal.texts.items()),
        }


def half(model: Model, tasks: list[list[int]], names: list[str], width: int, options: argparse.Namespace) -> list[Any]:
    """All ways over some tasks, in turns."""
    ways = [Way(model, name, width) for name in names]
    size = max(width, options.turn)
    for turn in range(options.turns):
        first = turn * size % len(tasks)
        numbers = [(first + place) % len(tasks) for place in range(size)]
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            way.decode(numbers, [tasks[number] for number in numbers], options.new_tokens)
    rows = [way.row(ways[0]) for way in ways]
    for row in rows:
        spread = round(statistics.pstdev(row["to_causal_by_turn"]), 3)
        print(json.dumps({**row, "to_causal_by_turn": spread}), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", default="1,4,16", help="at a time")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--turn", type=int, default=6, help="tasks of a turn, at least")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--commit", help="of the tree, where git cannot tell")
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise SystemExit("seconds are those of one thread: set OMP_NUM_THREADS=1")
    torch.set_num_threads(1)
    for module in (flarec.decode.rows, flarec.decode.graphs):
        vars(module)["clock"] = time.process_time
    model = flarec.load(options.checkpoint, device="cpu", dtype="float32", graphs="off", compile="off")
    examples = read_examples(TASKS, model, limit=options.tasks)
    prompts = [list(example.ids[: example.responses[0][0]]) for example in examples]
    Way(model, "horizon, 1 to 3", 1).decode([0], prompts[:1], 8)  # lowered once
    found: dict[str, Any] = {"choose": [], "report": []}
    commit = options.commit or _commit()
    for width in map(int, options.requests.split(",")):
        names = ["causal", "branches", *PLACED]
        seen = half(model, prompts[::2], names, width, options)
        best = max((row for row in seen if PLACED.get(row["name"])), key=lambda row: row["to_causal"])["name"]
        found["choose"] += seen
        found["report"] += half(model, prompts[1::2], ["causal", "branches", "auto", best], width, options)
        assert model.manifest is not None
        record = {
            "command": "python benchmarks/placed_drafts.py " + " ".join(sys.argv[1:]),
            "commit": commit, "device": "CPU, one thread, seconds of the process",
            "versions": model.manifest.versions, "head": model.manifest.metrics["horizon"], **found,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    main()
