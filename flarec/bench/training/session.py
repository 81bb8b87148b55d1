"""A run over the parts: each in a process of its own, once, within the time that is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flarec.errors import UsageError

from ..baselines import beside, check_library
from ..measure import NotMeasured
from ..session import Session
from ..shapes import SHAPES
from .shapes import EVERY, MICRO, SHAPE_OF, PartPlan

PART_LIMIT = 180.0
"""Seconds of one part."""
AHEAD_SHARE = 0.3
"""Of the time limit, for compiling ahead."""
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
MODULE = "flarec.bench.training.part"
Result = dict[str, Any]


class TrainingSession(Session):
    """Parts of a run. rows, length = of an optimizer step, in clean tokens; micro = rows of a pass instead of those of
    each part; library = a folder with flash-linear-attention, for the stock model alone; limit = seconds of all."""

    def __init__(
        self, device: torch.device, shape: str = "2B", *, rows: int = 8, length: int = 2048, micro: Sequence[int] = (),
        compile: str = "auto", library: Path | None = None, quick: bool = False, limit: float = 540.0,
        budget_ms: float = 100, say: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__(device, budget_ms=budget_ms)
        if shape not in SHAPES:
            raise UsageError(f"unknown shape {shape}; choose {', '.join(SHAPES)}")
        check_library(library)
        self.shape, self.rows, self.length, self.micro = shape, rows, length, tuple(micro)
        self.compile, self.library, self.quick, self.limit, self.say = compile, library, quick, limit, say
        self.on_gpu = device.type == "cuda"
        self.started = time.monotonic()
        self.results: dict[str, Result] = {}

    @property
    def tokens(self) -> int:
        """Clean tokens of a step."""
        return self.rows * self.length

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.started)

    def plan(self, part: str, shape: str | None = None) -> PartPlan:
        chosen = shape or (SHAPE_OF.get(part, self.shape) if self.shape == "2B" else self.shape)
        micro = tuple(dict.fromkeys(min(rows, self.rows) for rows in self.micro or MICRO[part]))
        every = part in EVERY or bool(self.micro)
        return PartPlan(part, chosen, str(self.device), self.rows, self.length, micro, self.compile, self.quick, every)

    def part(self, name: str) -> Result:
        """What a part measured, with "tries" of which at least one has "seconds".

        Raises `NotMeasured` with the reason for one that failed, or that had no time.
        """
        if name not in self.results:
            self.results[name] = self._run(name)
        result = self.results[name]
        if not fitting(result):
            tried = [one["error"] for one in result.get("tries", ()) if "error" in one]
            raise NotMeasured(result.get("error") or (tried or ["nothing was measured"])[0])
        return result

    def _run(self, name: str) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            path, own = Path(folder) / "result.json", {}
            if name == "first-step":  # nothing was compiled before
                own = {cache: str(Path(folder) / cache) for cache in CACHES}
            limit = min(PART_LIMIT, self.left())
            if limit <= 0:
                return {"error": f"the time limit of {self.limit:g} s was reached"}
            command = [*python(), json.dumps(asdict(self.plan(name))), str(path)]
            error = ""
            try:
                done = subprocess.run(command, env=self.environment(name) | own, stdout=subprocess.DEVNULL,
                                      stderr=subprocess.PIPE, text=True, timeout=limit)
                if done.returncode:
                    error = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            except subprocess.TimeoutExpired:
                error = f"it took more than {limit:.0f} s"
            found: Result = json.loads(path.read_text()) if path.is_file() else {}
            return {**found, **({"error": error} if error else {})}

    def environment(self, part: str) -> dict[str, str]:
        """With the library for the stock model alone; captures are not looked for."""
        values = {"FLAREC_CACHE_DIR": "off", **os.environ}
        if self.library and part.startswith("stock"):
            values |= beside(self.library)
        return values

    def compile_ahead(self, parts: Sequence[str]) -> dict[str, str]:
        """Kernels of some parts into the compilers' caches, in processes side by side; says how each ended."""
        count = max(1, min(12, (os.cpu_count() or 1) - 3))
        commands: dict[str, list[str]] = {}
        for part in parts:
            if part == "stock":
                commands |= {f"stock {i}": ["warm-stock", str(i), str(count), str(self.device)] for i in range(count)}
            elif part not in ("stock-compiled", "first-step", "doctor"):
                shape = "warm-large" if part in SHAPE_OF else "warm"
                plan = asdict(self.plan(part, shape)) | {"rows": 1, "micro": (1,), "quick": True, "compile": "off"}
                commands[part] = [json.dumps(plan)]
        running = {
            name: subprocess.Popen([*python(), *words], env=self.environment(name), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
            for name, words in commands.items()
        }
        end, ended = time.monotonic() + AHEAD_SHARE * self.limit, dict[str, str]()
        for name, process in running.items():
            try:
                _, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
                ended[name] = "done" if process.returncode == 0 else (errors.strip().splitlines() or ["?"])[-1][:200]
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                ended[name] = "stopped: no time left"
        return ended


def python() -> list[str]:
    """Not with what lies in the working directory."""
    return [sys.executable, "-P", "-m", MODULE]


def fitting(result: Result) -> list[Result]:
    return [one for one in result.get("tries", ()) if "seconds" in one]


def chosen(result: Result, memory: float | None = None) -> Result:
    """The fastest try within `memory` GiB, else the fastest."""
    every = fitting(result)
    small = [one for one in every if memory is not None and one["peak_gib"] is not None and one["peak_gib"] <= memory]
    return min(small or every, key=lambda one: float(one["seconds"]))
