"""What `--drafts auto` gives by the costs of steps alone: the engine and the rows of `flarec bench decode`, on a clock
that steps advance by what they cost on a GPU.

    python benchmarks/auto_simulated.py --out benchmarks/results/auto-simulated-cpu.json --commit $(git rev-parse HEAD)

Policy, scheduler, buffers and replays are those that a GPU runs; the program computes nothing. A step costs CAUSAL_MS
of its requests, times a line in the rows of a request up to WHOLE for 4 clean rows and 4 blocks of 3, and SHIFT for
drafting at all; a step that is no replay EAGER_MS more; spreading buffers SPREAD_MS. Every cost is `--noise` off, some
steps take twice as long, and the load of the host changes every 50 steps. The work of the host is in no cost: the JSON
of a GPU has it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flarec.bench.report import versions
from flarec.bench.serving import ours
from flarec.bench.serving.rows import AUTO, HIGH, LOW
from flarec.decode import Engine, graphs, rows
from flarec.decode.cache import Cache
from flarec.decode.graphs import Function, PlainReplays, Store
from flarec.decode.stores import Shelf
from flarec.ir.slots import CacheSlot
from flarec.layout import Layout

CAUSAL_MS, WHOLE = {1: 1.87, 8: 2.2, 64: 4.6}, {1: 1.10, 8: 1.14, 64: 2.8}
"""Of decode-h200-b8568ba.json and a line through it: 64 requests were not measured alone."""
SHIFT, EAGER_MS, SPREAD_MS = 0.03, 50.0, 0.6
COLD, COLD_MS = 1.4, 20.0
"""With --cold: what steps take longer behind one that is no replay, and for how long."""
VOCABULARY = 8


class Machine:
    """A clock, and what runs on it."""

    def __init__(self, requests: int, noise: float, seed: int, cold: bool = False) -> None:
        self.requests, self.noise, self.rng, self.cold = requests, noise, random.Random(seed), cold
        self.seconds, self.load, self.replays = 0.0, 1.0, False
        self.warm = 0.0  # from which second on steps take as long as they do

    def clock(self) -> float:
        return self.seconds

    def step(self, length: int) -> None:
        rng, noise = self.rng, self.noise
        cost = 1 + (WHOLE[self.requests] - 1) * (length - 1) / 15 + SHIFT * (length > 1)
        if rng.random() < 0.02:
            self.load = rng.uniform(1, 1 + 3 * noise)
        cost *= self.load * rng.uniform(1 - noise, 1 + noise) * (2 if rng.random() < 0.002 else 1)
        cost *= COLD if self.seconds < self.warm else 1
        self.seconds += 1e-3 * (CAUSAL_MS[self.requests] * cost + (0 if self.replays else EAGER_MS))
        if self.cold and not self.replays:
            self.warm = self.seconds + 1e-3 * COLD_MS

    def record(self, function: Function) -> Function:
        def replay() -> None:
            self.replays = True
            function()
            self.replays = False

        return replay


class Recorder(PlainReplays):
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def record(self, function: Function) -> Function:
        return self.machine.record(function)


class Costs:
    """A `DecodeProgram` whose steps take time and nothing else."""

    device, vocab_size = torch.device("cpu"), VOCABULARY
    cache_slots = (
        CacheSlot("window", "conv", ("batch", 2, 3), torch.float32),
        CacheSlot("pending", "pending_k", ("batch", "pending", 2), torch.float32),
        CacheSlot("keys", "keys", ("batch", "capacity"), torch.int8),
    )

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def step(self, input_ids: Tensor, layout: Layout, head_rows: Tensor, cache: Cache) -> Tensor:
        self.machine.step(layout.length)
        cache.tensors["window"] = torch.zeros(layout.rows, 2, 3 + layout.clean_length)
        cache.tensors["pending"] = torch.zeros(layout.rows, layout.clean_length, 2)
        return torch.zeros(len(head_rows), VOCABULARY)


class Session:
    """What a row asks of a `ServingSession`."""

    device, on_gpu, block, steps = torch.device("cpu"), True, 3, 200

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def measured(self, key: object, make: Any) -> Any:
        return make()  # every run has its own session

    def wait(self) -> None:
        pass

    def prompts(self, requests: int, tokens: int | None = None) -> list[list[int]]:
        return [[1] * 8 for _ in range(requests)]

    def engine(self, slots: int, *, kind: type[Engine] = Engine, dynamic: bool = False) -> Engine:
        engine = kind(
            Costs(self.machine), mask_token_id=VOCABULARY - 1, block_size=self.block, eos_ids=(), slots=slots,
            max_positions=1 << 20, readouts={"ar-trust": "causal"}, suppress=(VOCABULARY - 1,),
        )
        engine.shelf = Shelf(lambda: Recorder(self.machine))
        return engine


def ratios(
    requests: int, noise: float, seed: int, wanted: Sequence[float] = (*LOW, *HIGH), cold: bool = False
) -> dict[float, float]:
    machine = Machine(requests, noise, seed, cold)
    spread = Store.spread

    def timed(store: Store, held: int) -> None:
        machine.seconds += 1e-3 * SPREAD_MS * (held > store.held)
        spread(store, held)

    patched: Any = Store
    patched.spread = timed
    vars(ours)["time"] = types.SimpleNamespace(perf_counter=machine.clock)
    for module in (graphs, rows):
        vars(module)["clock"] = machine.clock
    try:
        session: Any = Session(machine)
        found = ours.chosen_rates(session, requests, wanted)
        return {tokens: one.ratio for tokens, one in found.items()}
    finally:
        patched.spread = spread


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="Steps behind a recorded one take longer for a while.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for requests in AUTO:
        each = [ratios(requests, options.noise, seed, cold=options.cold) for seed in range(options.seeds)]
        spread = {f"{tokens:g} per step": sorted(round(one[tokens], 4) for one in each) for tokens in (*LOW, *HIGH)}
        found[str(requests)] = spread
        print(f"C = {requests}: {spread}", flush=True)
    if options.out is not None:
        record = {"versions": versions(), "commit": options.commit, "command": " ".join(["python", *sys.argv]),
                  "causal_ms": CAUSAL_MS, "whole": WHOLE, "noise": options.noise, "cold": options.cold, "ratios": found}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
