"""Time two-stream linear attention on the CPU: forward + backward of one clean stream with two noisy views against the
clean stream alone, both through the same code, with transformers' chunked gated delta rule for information.

    python benchmarks/cpu_linear_attention.py [--out results.json] [--repeats 9] [--threads 2]

The target is a ratio of at most 4 for three times as many tokens. Nothing is timed before the fast code has been
compared with the reference. The variants take turns, so that a busy machine disturbs all of them alike; the median
and the fastest of the repeats are reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from flarec.kernels.linear_attention import reference
from flarec.kernels.linear_attention.panels.chunk import two_stream, two_stream_step
from flarec.kernels.linear_attention.panels.commit import commit
from flarec.kernels.linear_attention.panels.schedule import StateSchedule
from flarec.layout import Block, Layout, build_layout

TARGET = 4.0
ROWS, TOKENS, HEADS, DIM, BLOCK = 2, 1024, 4, 64, 4


def inputs(layout: Layout, heads: int, dim: int, dtype: torch.dtype) -> Any:  # unpacked before keywords
    """q, k, v, g, beta of one layer as a list of leaves; scalar gate."""
    gen = torch.Generator().manual_seed(0)
    shape = (layout.rows, layout.length, heads)
    q, k, v = (torch.randn(*shape, dim, generator=gen, dtype=torch.float64) for _ in range(3))
    g, beta = -0.3 * torch.rand(shape, generator=gen, dtype=torch.float64), torch.rand(shape, generator=gen).double()
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g, beta)]


def two_views(rows: int, tokens: int) -> Layout:
    grid = [Block(0, anchor, BLOCK, view) for view in (0, 1) for anchor in range(0, tokens, BLOCK)]
    return build_layout([[tokens]] * rows, [grid] * rows)


def options(dim: int) -> dict[str, Any]:
    return {"scale": dim**-0.5, "delta": True, "l2norm": True}


def check() -> float:
    """Largest difference between fast code and reference, forward and gradients, in float64; refuses above 1e-10."""
    layout = two_views(1, 72)
    leaves = inputs(layout, 2, 8, torch.float64)
    results = []
    ops: list[tuple[Callable[..., Tensor], object]] = [
        (reference, layout),
        (two_stream, StateSchedule.from_layout(layout, 16)),
    ]
    for op, where in ops:
        out = op(*leaves, where, **options(8))
        results.append([out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)])
    worst = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
    if not worst < 1e-10:
        sys.exit(f"the fast code differs from the reference by {worst:.1e}; nothing was timed")
    return worst


def training_step(op: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    def step() -> None:
        out = op(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


def measure(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every step, in turns after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median_ms": 1e3 * sorted(times)[len(times) // 2], "fastest_ms": 1e3 * min(times)}
        for name, times in seconds.items()
    }


def training_steps() -> dict[str, Callable[[], object]]:
    clean, views = build_layout([[TOKENS]] * ROWS, [[]] * ROWS), two_views(ROWS, TOKENS)
    clean_schedule, views_schedule = StateSchedule.from_layout(clean), StateSchedule.from_layout(views)
    name = "torch_chunk_gated_delta_rule"
    fast: Callable[..., Tensor] = two_stream
    plain = getattr(modeling_qwen3_5, name)
    plain = getattr(plain, "__wrapped__", plain)
    clean_leaves, views_leaves = (inputs(layout, HEADS, DIM, torch.float32) for layout in (clean, views))
    return {
        "clean stream": training_step(lambda *x: fast(*x, clean_schedule, **options(DIM)), clean_leaves),
        "clean stream + 2 views": training_step(lambda *x: fast(*x, views_schedule, **options(DIM)), views_leaves),
        f"transformers {name}": training_step(lambda *x: plain(*x, use_qk_l2norm_in_kernel=True)[0], clean_leaves),
    }


def decode_steps() -> dict[str, Callable[[], object]]:
    """One layer of a draft-and-verify step: 8 requests, 5 clean rows, 5 blocks of 4."""
    blocks = [Block(0, 101 + i, 4) for i in range(5)]
    layout = build_layout([[5]] * 8, [blocks] * 8, cached=[100] * 8)
    schedule = StateSchedule.from_layout(layout)
    leaves = [x.detach() for x in inputs(layout, 4, 32, torch.float32)]
    state, accepted = torch.zeros(8, 4, 32, 32), torch.full((8,), 3)

    def step() -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return two_stream_step(*[*leaves, schedule], **options(32), initial_state=state, clean_length=5)

    kept: Any = step()[1:]
    return {
        "decode: schedule": lambda: StateSchedule.from_layout(layout),
        "decode: step": step,
        "decode: commit": lambda: commit(state, *[*kept, accepted]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    difference = check()
    times = measure(training_steps(), args.repeats) | measure(decode_steps(), 10 * args.repeats)

    ratio = {
        kind: times["clean stream + 2 views"][kind] / times["clean stream"][kind]
        for kind in ("median_ms", "fastest_ms")
    }
    share = times["decode: schedule"]["median_ms"] / times["decode: step"]["median_ms"]
    print(f"fast code equals the reference to {difference:.1e} (float64, forward and gradients)")
    shape = f"{ROWS} rows x {TOKENS} clean tokens, {HEADS} heads, K = V = {DIM}, blocks of {BLOCK}"
    print(f"{shape}, float32, scalar gate + delta")
    for name, values in times.items():
        print(f"{name:45} median {values['median_ms']:9.2f} ms   fastest {values['fastest_ms']:9.2f} ms")
    verdict = "met" if ratio["median_ms"] <= TARGET else "MISSED"
    print(f"the schedule, once per forward, over one layer's step of decoding: {share:.2f}")
    print(f"ratio {ratio['median_ms']:.2f} (fastest {ratio['fastest_ms']:.2f}), target {TARGET}: {verdict}")
    if args.out:
        commit_id = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        record = {
            "device": f"{platform.machine()} CPU, {args.threads} threads",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "command": " ".join(["python", "benchmarks/cpu_linear_attention.py", *sys.argv[1:]]),
            "commit": commit_id or None,
            "shape": {"rows": ROWS, "tokens": TOKENS, "heads": HEADS, "dim": DIM, "block_size": BLOCK, "views": 2},
            "difference_from_reference": difference,
            "times": times,
            "ratio": ratio,
            "decode schedule over step": share,
            "target": TARGET,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
