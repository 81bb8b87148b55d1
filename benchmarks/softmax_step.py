"""Launches of softmax attention's decode step beside the one that is chosen: which tiles and splits are fastest.

    python benchmarks/softmax_step.py --out out/softmax-step.json                            # on a GPU
    TRITON_INTERPRET=1 python benchmarks/softmax_step.py --device cpu --heads 2 --dims 16    # does it run?

Each case is a step of some requests with 1 or 4 clean rows and as many blocks of 3 behind a context, 8 heads of 256
over 2 key heads or 16 of 128 over 4, bfloat16. Times are microseconds of one launch and its combination, of 20 in a
CUDA graph (`Clock.graph_ms`); a launch whose output is not that of the chosen one is dropped, which the record
says. `launch_of` is fitted to an H200's times of both; the record holds those of 256 (--dims 256), its own choice
among them.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from flarec.bench.measure import Clock
from flarec.kernels.softmax_attention.step.launch import StepLaunch, launch_of, run
from flarec.layout import Block, build_layout

CASES = (
    (1, 1, 512), (1, 4, 512), (8, 1, 512), (8, 4, 512), (32, 1, 512), (32, 4, 512), (64, 4, 512), (8, 4, 4000),
    (1, 4, 4000), (1, 1, 32768), (1, 4, 32768), (8, 4, 32768),
)
"""(requests, clean rows and blocks behind them (1: none), cached tokens)."""
LONG = 32768
TABLES = (
    "clean_document", "clean_position", "noisy_block", "noisy_position", "block_anchor", "block_readout", "cached",
)


def step_of(
    case: tuple[int, int, int], dim: int, options: argparse.Namespace
) -> tuple[Callable[[StepLaunch], Tensor], StepLaunch]:
    """A function of the launch, and the launch that is chosen."""
    rows, clean, cached = case
    device, dtype = torch.device(options.device), torch.bfloat16 if options.device != "cpu" else torch.float32
    blocks = [] if clean == 1 else [Block(0, cached + place + 1, 3, readout="causal") for place in range(clean)]
    layout = build_layout([[clean]] * rows, [blocks] * rows, cached=[cached] * rows).to(device)
    heads = options.heads or 2048 // dim
    key_heads = max(1, heads // 4)
    capacity = 1 << (cached + clean).bit_length()

    def made(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=dtype)

    q = made(rows, layout.length, heads, dim).transpose(1, 2)
    k, v = (made(rows, layout.length, key_heads, dim).transpose(1, 2) for _ in "kv")
    caches = [made(rows, key_heads, capacity, dim) for _ in "kv"]
    tables = tuple(getattr(layout, name) for name in TABLES)
    chosen = launch_of(dtype, dim, heads // key_heads * layout.length, rows * key_heads, capacity)
    k_cache, v_cache = caches

    def step(launch: StepLaunch) -> Tensor:
        return run(q, k, v, k_cache, v_cache, tables, scale=dim**-0.5, window=None, softcap=None, launch=launch)

    return step, chosen


def beside(chosen: StepLaunch, case: tuple[int, int, int]) -> list[StepLaunch]:
    """The chosen launch, and others of few rows of queries and of many."""
    found = [chosen]
    for queries, keys, power, stages in product((16, 64), (32, 64), range(7), (1, 2)):
        splits = 1 << power
        if splits * keys <= 2 * case[2] and (case[2] < LONG or splits * case[0] >= 32):
            for warps in (4, 8) if queries == 64 else (4,):
                found.append(replace(chosen, queries=queries, keys=keys, splits=splits, warps=warps, stages=stages))
    return list(dict.fromkeys(found))


def timed(case: tuple[int, int, int], dim: int, options: argparse.Namespace) -> dict[str, Any]:
    step, chosen = step_of(case, dim, options)
    wanted, found, dropped, clock = step(chosen).double(), [], 0, Clock(torch.device(options.device))
    for launch in beside(chosen, case)[: options.launches]:
        try:
            same = float((step(launch).double() - wanted).norm() / wanted.norm()) < 0.02
        except Exception as error:  # too much shared memory
            same = False
            print(f"   {launch}: {str(error).splitlines()[0][:100]}", flush=True)
        if same:
            found.append({**asdict(launch), "us": 1e3 * clock.graph_ms([partial(step, launch)] * 5)})
        dropped += not same
    name = {"dim": dim, **dict(zip(("requests", "clean", "cached"), case, strict=True))}
    best = min(found, key=lambda one: one["us"])
    print(f"{name}: chosen {found[0]['us']:.2f} us; best {best}", flush=True)
    return {**name, "chosen": found[0], "timed": found, "dropped": dropped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--heads", type=int, help="default: 2048 / dim; a quarter of them are key heads")
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 128])
    parser.add_argument("--launches", type=int, default=1000, help="at most, per case")
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first ones of each dim")
    parser.add_argument("--commit", help="of the tree, where git cannot tell")
    options = parser.parse_args()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False)
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/softmax_step.py", *sys.argv[1:]]),
        "commit": options.commit or head.stdout.strip() or None,
        "device": torch.cuda.get_device_name() if options.device != "cpu" else f"{platform.machine()} CPU",
        "versions": {"torch": torch.__version__}, "rows": [],
    }
    for dim, case in product(options.dims, CASES[: options.cases]):
        record["rows"].append(timed(case, dim, options))
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
