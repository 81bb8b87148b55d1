"""Compile the Triton kernels for an H100 where there is none: `python -m tools.compile_kernels kda --dtype float16`.

Triton's interpreter shows what kernels compute, not whether they compile, how many registers they spill, or whether
ptxas makes right code of them. Here the ops run on small CPU tensors with the sizes of the benchmark, forward and
backward, and every launch compiles (for sm_90, with the ptxas of the installed Triton) instead of running. A line per
op, and one per kernel that no op before had: registers and bytes of stack of a thread, shared memory, and faults that
`compiled_code.py` looks for.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flarec.bench import conv, decode
from flarec.bench.problems import Conv, DecodeStep, Linear, Softmax, StreamSizes
from flarec.bench.rows import ATTENTION, CONV, KDA, LAYER, MAMBA, STEP, WIDE_ATTENTION
from flarec.kernels.linear_attention.tiles.prefill import linear_attention_prefill
from flarec.kernels.linear_attention.tiles.schedule import TileSchedule, largest_chunk
from flarec.kernels.linear_attention.tiles.train import two_stream
from flarec.kernels.sampling import triton_choice
from flarec.kernels.short_conv.triton_conv import ConvSchedule
from flarec.kernels.softmax_attention import triton_attention
from flarec.kernels.softmax_attention.attention_schedule import AttentionSchedule
from flarec.kernels.softmax_attention.step.launch import MANY_ROWS
from flarec.kernels.softmax_attention.step.launch import step as attention_step
from flarec.layout import Block, build_layout
from tools.compiled_code import faults, nvdisasm

SHORT = StreamSizes(rows=1, tokens=64)


@dataclass(frozen=True)
class Sampling:
    """Rows of logits that one token each is chosen from."""

    dtype: torch.dtype = torch.bfloat16
    vocab: int = 248320


@dataclass(frozen=True)
class Compiled:
    """A kernel's needs: registers and bytes of stack of a thread, bytes of shared memory; faulty instructions."""

    name: str
    registers: int
    stack: int
    shared: int
    faulty: list[str]


class H100:
    """In place of Triton's driver: says what to compile for."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(found: Callable[[Any], None]) -> None:
    """From now on a launch compiles its kernel and gives it to `found`."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(H100(GPUTarget("cuda", 90, 32)))
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found(kernel)
        return kernel

    JITFunction.run = run


def examine(kernel: Any) -> Compiled:
    bin_folder = nvdisasm().parent
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [bin_folder / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
        return Compiled(
            kernel.metadata.name, numbers["REG"], numbers["STACK"], kernel.metadata.shared, faults(cubin, nvdisasm())
        )


def differentiate(op: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    out = op(*leaves)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def compile_linear(problem: Linear) -> None:
    problem = replace(problem, streams=SHORT)
    layout = problem.streams.layout("cpu")
    size = largest_chunk(problem.dtype, problem.key_dim, problem.value_dim)
    schedule, options = TileSchedule.from_layout(layout, size), problem.options() | {"l2norm": True}  # as in models

    def op(*leaves: Tensor) -> Tensor:
        out: Tensor = two_stream(**problem.named(leaves), schedule=schedule, **options)
        return out

    differentiate(op, problem.inputs(layout.length, "cpu"))


def compile_linear_prefill(problem: Linear) -> None:
    """A hundred clean rows and a block on a cached state."""
    layout = build_layout([[100]], [[Block(0, 300, 3)]], cached=[200])
    heads, keys, values = problem.heads, problem.key_dim, problem.value_dim
    gate = {"none": False, "scalar": True}[problem.gate]
    q, k, v, g, beta = (x.detach() for x in problem.inputs(layout.length, "cpu"))
    size = largest_chunk(problem.dtype, keys, values)
    state, kept = torch.zeros(1, heads, keys, values), torch.zeros(1, 0, k.shape[2], keys)
    linear_attention_prefill(
        q, k, v, g, beta, state, kept, torch.zeros(1, 0, heads, values), torch.zeros(1, 0, heads) if gate else None,
        torch.zeros(1, dtype=torch.int64), TileSchedule.from_layout(layout, size),
        clean_padding=torch.zeros(1, 100, dtype=torch.bool), **problem.options() | {"l2norm": True},
    )


def compile_conv(problem: Conv) -> None:
    problem = replace(problem, streams=SHORT)
    layout = problem.streams.layout("cpu")
    differentiate(
        partial(conv.kernel, schedule=ConvSchedule.from_layout(layout, problem.width)),
        problem.inputs(layout.length, "cpu"),
    )


def compile_attention(problem: Softmax) -> None:
    problem = replace(problem, streams=SHORT)
    layout = problem.streams.layout("cpu")
    schedule = AttentionSchedule.from_layout(layout)
    differentiate(
        lambda q, k, v: triton_attention.two_stream(q, k, v, schedule, scale=problem.scale),
        problem.inputs(layout.length, "cpu"),
    )


def compile_attention_step(problem: Softmax) -> None:
    """Four clean rows and a block behind each, over a long cache; and over a short one, which is not split."""
    blocks = [Block(0, 200 + i, 3) for i in range(1, 5)]
    layout = build_layout([[4]], [blocks], cached=[200])
    for capacity in (256, 32768):
        heads = (problem.heads, problem.key_heads, problem.key_heads)
        q, k, v = (torch.zeros(1, n, layout.length, problem.dim, dtype=problem.dtype) for n in heads)
        cache = torch.zeros(1, problem.key_heads, capacity, problem.dim, dtype=problem.dtype)
        attention_step(q, k, v, cache, cache.clone(), layout, scale=problem.scale)


def compile_attention_prefill(problem: Softmax) -> None:
    """So many clean rows that they are a prefill, over a short cache and a long one, which is split; windows too."""
    layout = build_layout([[MANY_ROWS]], [[]], cached=[200])
    for capacity, window in ((2048, None), (2048, 512), (32768, None)):
        heads = (problem.heads, problem.key_heads, problem.key_heads)
        q, k, v = (torch.zeros(1, n, layout.length, problem.dim, dtype=problem.dtype) for n in heads)
        cache = torch.zeros(1, problem.key_heads, capacity, problem.dim, dtype=problem.dtype)
        attention_step(q, k, v, cache, cache.clone(), layout, scale=problem.scale, window=window)


def compile_decode(problem: DecodeStep) -> None:
    decode.step(replace(problem, batch=1), torch.device("cpu"), 0)()


def compile_sampling(problem: Sampling) -> None:
    logits, out = torch.zeros(1, problem.vocab, dtype=problem.dtype), torch.zeros(problem.vocab, dtype=torch.bool)
    one, word = torch.ones(1), torch.ones(1, dtype=torch.int64)
    triton_choice.choose_rows(logits, one, 20 * word, one, word, word, out, True, True)


OPS: dict[str, tuple[Callable[[Any], None], Any]] = {
    "linear": (compile_linear, LAYER),
    "kda": (compile_linear, KDA),
    "mamba2": (compile_linear, MAMBA),
    "linear-prefill": (compile_linear_prefill, LAYER),
    "conv": (compile_conv, CONV),
    "attention": (compile_attention, ATTENTION),
    "attention-step": (compile_attention_step, ATTENTION),
    "attention-step-wide": (compile_attention_step, WIDE_ATTENTION),
    "attention-prefill": (compile_attention_prefill, ATTENTION),
    "attention-prefill-wide": (compile_attention_prefill, WIDE_ATTENTION),
    "decode": (compile_decode, STEP),
    "sampling": (compile_sampling, Sampling()),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(OPS)}; by default all")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--key-dim", type=int, help="of linear attention")
    parser.add_argument("--value-dim", type=int, help="of linear attention")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set, so that kernels are interpreted; unset it")
    unknown = [name for name in options.ops if name not in OPS]
    if unknown:
        parser.error(f"unknown op '{unknown[0]}'; choose among {', '.join(OPS)}")
    dims = {"key_dim": options.key_dim, "value_dim": options.value_dim}
    seen: dict[str, Compiled] = {}

    def found(kernel: Any) -> None:
        if kernel.hash not in seen:
            one = seen[kernel.hash] = examine(kernel)
            bad = f"  FAULTY: {one.faulty[0]}" if one.faulty else ""
            needs = f"{one.registers:>4} registers{one.stack:>6} B stack{one.shared:>8} B shared"
            print(f"{one.name:<42}{needs}{bad}", flush=True)

    compile_only(found)
    for name in options.ops or OPS:
        run, problem = OPS[name]
        print(f"{name}:", flush=True)
        problem = replace(problem, dtype=getattr(torch, options.dtype))
        if isinstance(problem, Linear):
            problem = replace(problem, **{key: value for key, value in dims.items() if value is not None})
        run(problem)
    return int(any(one.faulty for one in seen.values()))


if __name__ == "__main__":
    sys.exit(main())
