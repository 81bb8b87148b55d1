"""Whether the caches of a request that has decoded for long are those of a prefill of its text.

    python -m tests.decode.drift --steps 5000 --out benchmarks/results/state-drift-cpu.json

A tiny model decodes in AR-Trust, rejections included. Then its text is read anew, in float32 and, as the witness, in
float64, and the same token is run on all three caches, which commits what was pending. Of every slot of the cache the
distance from the witness is measured, relative to its size: the decoded cache may be as far as the fresh one, up to the
order in which float32 sums are rounded.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flarec.base.generation import GenerationOptions
from flarec.decode.cache import Cache
from flarec.decode.modes.ar_trust import ARTrustMode
from flarec.decode.prefill import Prefill
from flarec.decode.request import Request, Stopping
from flarec.decode.rows import Rows
from flarec.decode.stepper import BlockSpec, Stepper
from flarec.frontend.export import capture
from flarec.ir.program import Program
from flarec.passes import lower
from tests.models import FAMILIES, VOCABULARY, captured, shared_model

BLOCK = 3
MASK = VOCABULARY - 1
CHUNK = 512
UNIT = 2.0**-24
"""Of float32's rounding."""


def programs(family: str) -> tuple[Program, Program]:
    """In float32, and of the same parameters in float64."""
    double = copy.deepcopy(shared_model(family)).double()
    return lower(captured(family), "decode"), lower(capture(double), "decode")


def decoded(program: Program, steps: int, seed: int = 0) -> tuple[Rows, list[int], int]:
    """A request after that many steps, the text in its cache, and how many drafts were accepted."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, MASK, (11,), generator=generator).tolist()
    options = GenerationOptions(mode="ar-trust", temperature=0.7, seed=seed)
    limit = (BLOCK + 1) * steps + 2
    request = Request(0, prompt, limit, Stopping(), options)
    mode = ARTrustMode(BlockSpec(BLOCK, BLOCK, "causal", MASK))
    rows = Rows(program, mode, [request], [options], None)
    with torch.no_grad():
        while not Prefill(rows, CHUNK).advance():
            pass
        for _ in range(steps):
            rows.step()
    text = [*prompt, *request.tokens]
    return rows, text, sum(depth * count for depth, count in request.histogram.items())


def read(program: Program, text: Sequence[int]) -> Cache:
    """The cache behind a text."""
    stepper = Stepper(program, Cache.allocate(program.cache_slots, 1, len(text) + 1, program.device))
    for start in range(0, len(text), CHUNK):
        piece = text[start : start + CHUNK]
        plan = stepper.plan([len(piece)], heads=[1])
        stepper.run(plan, stepper.clean([piece]))
        stepper.cache.accept(plan.counts)
    return stepper.cache


def committed(program: Program, cache: Cache, token: int) -> dict[str, Tensor]:
    """The slots of a cache once a token was run on it, without what lies behind its end."""
    cache.reserve(int(cache.length) + 1)
    stepper = Stepper(program, cache)
    stepper.run(stepper.plan([1]), stepper.clean([[token]]))
    end = int(cache.length) + 1
    slots = {slot.name: slot for slot in cache.slots}
    return {
        name: tensor.narrow(slots[name].shape.index("capacity"), 0, end) if slots[name].in_place else tensor
        for name, tensor in cache.tensors.items()
    }


def drift(family: str, steps: int) -> dict[str, Any]:
    """Of the slot that is worst: how far the decoded and the fresh cache are from the witness, in units of float32."""
    single, double = programs(family)
    rows, text, accepted = decoded(single, steps)
    *known, token = text
    assert int(rows.cache.length) == len(known)
    found, fresh, witness = (
        committed(program, cache, token)
        for program, cache in (
            (single, rows.cache), (single, read(single, known)), (double, read(double, known))
        )
    )

    def distance(got: dict[str, Tensor], name: str) -> float:
        exact = witness[name]
        return float((got[name].double() - exact).norm() / exact.norm().clamp_min(1e-30)) / UNIT

    each = {name: (distance(found, name), distance(fresh, name)) for name in found}
    worst = max(each, key=lambda name: each[name][0] / max(each[name][1], 1.0))
    return {
        "family": family, "steps": steps, "tokens": len(text), "accepted": accepted,
        "worst": worst, "decoded_units": round(each[worst][0], 2), "fresh_units": round(each[worst][1], 2),
        "largest_ratio": round(each[worst][0] / max(each[worst][1], 1.0), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for family in options.families:
        rows.append(drift(family, options.steps))
        print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        command = f"python -m tests.decode.drift --steps {options.steps}"
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        record = {
            "what": "Caches after many AR-Trust steps beside those of a fresh prefill, distances from float64 in units "
            "of float32's rounding, of the slot whose ratio is largest",
            "device": f"{platform.machine()} CPU", "versions": versions, "command": command, "commit": options.commit,
            "rows": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
