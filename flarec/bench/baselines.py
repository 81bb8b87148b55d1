"""flash-linear-attention, the baseline of the benchmarks: imported when it is needed, and only if it is installed.

Two things are changed in it for the time of a run. Its backward of the gated delta rule refuses Hopper GPUs with
Triton 3.4 to 3.7.0 because of a miscompilation of tiles of 64 keys (its issue 640); at K = 128 it uses tiles of 128, so
the refusal is lifted and the gradients are checked against the reference before anything is timed. And its autotuning,
which is keyed by head counts and sizes but not by lengths, benchmarks every configuration for 16 instead of 125 ms,
and twice if it is slow.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .measure import NotMeasured

PACKAGE = "flash-linear-attention"


def version() -> str | None:
    """The installed version, or None."""
    if importlib.util.find_spec("fla") is None:
        return None
    from importlib import metadata

    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "unknown"


def check_library(folder: Path | None) -> None:
    """Raise `UsageError` for a folder that is none with the package in it."""
    if folder is not None and not (folder / "fla").is_dir():
        raise UsageError(f"{folder} has no package fla; install {PACKAGE} into it (pip --target)")


def release(folder: Path | None) -> str | None:
    """The version of the package in a folder, or None without one."""
    if folder is None:
        return None
    from importlib import metadata

    return next((found.version for found in metadata.distributions(name=PACKAGE, path=[str(folder)])), "unknown")


def beside(folder: Path) -> dict[str, str]:
    """What a process needs in its environment to import what lies in a folder."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


class Baselines:
    """Functions of flash-linear-attention with operands in our order and shapes [B, T, H, D]; clean streams only."""

    def __init__(self, *, tune: bool = True) -> None:
        """Raises `NotMeasured` if the package is not installed. tune: shorten the autotuning."""
        if version() is None:
            raise NotMeasured(f"{PACKAGE} is not installed")
        if tune:
            shorten_autotuning()
        import fla.ops.common.chunk_o as chunk_o

        chunk_o.TRITON_ABOVE_3_7_1 = True

    def gated_delta_rule(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Tensor:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        out: Tensor = chunk_gated_delta_rule(q, k, v, g, beta, scale=scale)[0]
        return out

    def kda(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Tensor:
        from fla.ops.kda import chunk_kda

        out: Tensor = chunk_kda(q, k, v, g, beta, scale=scale)[0]
        return out

    def simple_gla(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> Tensor:
        from fla.ops.simple_gla import chunk_simple_gla

        out: Tensor = chunk_simple_gla(q, k, v, g, scale=scale)[0]
        return out

    def short_conv(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, T, C], weight [C, W], with SiLU."""
        from fla.modules.causal_conv1d import causal_conv1d

        out: Tensor = causal_conv1d(x, weight, activation="silu")[0]
        return out

    def recurrent_step(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """One row per request, q [B, 1, H, K], on a state [B, H, K, V] float32: (output, next state)."""
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

        out, final = fused_recurrent_gated_delta_rule(
            q, k, v, g=g, beta=beta, scale=scale, initial_state=state, output_final_state=True
        )
        return out, final


SLOW_MS = 3.0
"""A configuration that takes longer is timed twice and no more: most of them lose, and they are most of the time."""


def shorten_autotuning(benchmark: Callable[..., Any] | None = None) -> None:
    """Let Triton's autotuner time each configuration briefly, or with `benchmark(fn, quantiles)`."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    def once(fn: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def short(fn: Callable[[], object], quantiles: Any = None) -> Any:
        fn()
        least = min(once(fn), once(fn))
        if least > SLOW_MS:
            return [least] * len(quantiles) if quantiles else least
        return do_bench(fn, warmup=4, rep=12, quantiles=quantiles)

    Autotuner.do_bench = property(lambda self: benchmark or short)
