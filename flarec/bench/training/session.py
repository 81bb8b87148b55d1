"""A run over the parts: each in a process of its own, once, within the time that is left."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from flarec.errors import UsageError

from ..baselines import beside, check_library, release
from ..measure import NotMeasured
from ..session import Session
from ..shapes import SHAPES
from .shapes import BEHIND, EVERY, MICRO, SHAPE_OF, PartPlan

PART_LIMIT, BEHIND_LIMIT = 120.0, 40.0
"""Seconds of a process, and of each part that is measured in it behind the first."""
AT_ONCE = 6
"""Processes that compile ahead at a time: they share the memory of one GPU, and the cores."""
AHEAD_SHARE = 0.35
"""Of the time limit, for compiling ahead."""
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
MODULE = "flarec.bench.training.part"
FIRST, DOCTOR = "first-step", "doctor"
Result = dict[str, Any]
Running = dict[str, subprocess.Popen[str]]


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
        self.wanted: tuple[str, ...] = ()
        """Parts that the rows of the run need: those that share a process are measured together."""
        self.is_warm = False
        """Whether what parts need was compiled before them."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"shape": self.shape, "rows": self.rows, "length": self.length, "micro": [*self.micro],
                "compile": self.compile, "quick": self.quick, "library": release(self.library)}

    @property
    def tokens(self) -> int:
        """Clean tokens of a step."""
        return self.rows * self.length

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.started)

    def plan(self, part: str, shape: str | None = None) -> PartPlan:
        chosen = shape or (SHAPE_OF.get(part, self.shape) if self.shape == "2B" else self.shape)
        micro = tuple(dict.fromkeys(min(rows, self.rows) for rows in self.micro or MICRO[part]))
        micro = micro[:1] if part == FIRST else micro
        every = part in EVERY or (bool(self.micro) and part != FIRST)
        return PartPlan(part, chosen, str(self.device), self.rows, self.length, micro, self.compile, self.quick, every)

    def part(self, name: str) -> Result:
        """What a part measured, with "tries" of which at least one has "seconds".

        Raises `NotMeasured` with the reason for one that failed, or that had no time.
        """
        if name not in self.results:
            first = BEHIND.get(name, name)
            if first not in self.results:
                behind = [part for part in BEHIND if BEHIND[part] == first and part in (*self.wanted, name)]
                self.results |= self._run([first, *behind])
            if name not in self.results:  # its process had no time left for it
                self.results[name] = {"error": self.results[first].get("error", "its process ended before it")}
        result = self.results[name]
        if not fitting(result):
            tried = [one["error"] for one in result.get("tries", ()) if "error" in one]
            raise NotMeasured(result.get("error") or (tried or ["nothing was measured"])[0])
        return result

    def _run(self, names: Sequence[str]) -> dict[str, Result]:
        limit = min(PART_LIMIT + BEHIND_LIMIT * (len(names) - 1), self.left())
        if limit <= 0:
            return {name: {"error": f"the time limit of {self.limit:g} s was reached"} for name in names}
        with tempfile.TemporaryDirectory() as folder:
            path, own = Path(folder) / "result.json", dict[str, str]()
            if names[0] == FIRST:  # nothing was compiled before
                own = {name: str(Path(folder) / name) for name in CACHES}
            command = [*python(), _json([self.plan(name) for name in names]), str(path), str(time.time())]
            error = ""
            try:
                done = subprocess.run(command, env=self.environment(names[0]) | own, stdout=subprocess.DEVNULL,
                                      stderr=subprocess.PIPE, text=True, timeout=limit)
                if done.returncode:
                    error = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            except subprocess.TimeoutExpired:
                error = f"it took more than {limit:.0f} s"
            return read(path, names, error)

    def environment(self, part: str) -> dict[str, str]:
        """With the library for the stock model alone; captures are not looked for."""
        values = {"FLAREC_CACHE_DIR": "off", **os.environ}
        if self.library and part.startswith("stock"):
            values |= beside(self.library)
        return values

    @contextlib.contextmanager
    def prepared(self, parts: Sequence[str]) -> Iterator[dict[str, str]]:
        """Within the context: what the parts of a run need is compiled, and each is told how that ended.

        A few parts at a time compile for a few layers, beside them the library's kernels and the doctor, and a step of
        `flare` with caches of its own, if its time is wanted: that is an upper bound.
        """
        end, ended = time.monotonic() + AHEAD_SHARE * self.limit, dict[str, str]()
        self.wanted, self.is_warm = tuple(parts), True
        with tempfile.TemporaryDirectory() as folder:
            path, beside = Path(folder) / "first.json", self._beside(Path(folder), parts)
            try:
                if FIRST in parts:
                    own = {name: str(Path(folder) / name) for name in CACHES}
                    words = [_json([self.plan(FIRST)]), str(path), str(time.time())]
                    beside[FIRST] = self._start(FIRST, words, own)
                ended |= _pooled(self._ahead(parts), end)
                others = {name: process for name, process in beside.items() if name != DOCTOR}
                ended |= _wait(others, end)
                if FIRST in parts:
                    self.results |= read(path, [FIRST], "" if ended[FIRST] == "done" else ended[FIRST])
                self.told, self.told_at = beside.get(DOCTOR), Path(folder) / "doctor.json"
                yield ended
            finally:
                for process in beside.values():
                    process.kill()
                    process.communicate()

    told: subprocess.Popen[str] | None = None
    told_at = Path()
    """The process of the doctor's prediction, which runs beside the others, and its result."""

    def prediction(self) -> Result:
        """What the doctor predicts; waits for it. Raises as `part`."""
        if DOCTOR not in self.results and self.told is not None:
            error = ""
            try:
                _, errors = self.told.communicate(timeout=max(0.1, self.left()))
                if self.told.returncode:
                    error = (errors.strip().splitlines() or ["no message"])[-1][:300]
            except subprocess.TimeoutExpired:
                error = f"the time limit of {self.limit:g} s was reached"
            self.results |= read(self.told_at, [DOCTOR], error)
        return self.part(DOCTOR)

    def seconds_of(self, prediction: Result) -> float:
        """Of the work that the doctor counted, at the rates of this device."""
        from flarec.doctor.rates import measure, seconds_of
        from flarec.doctor.simulate import Work

        width = SHAPES[self.shape]["hidden_size"]
        rates = self.measured("doctor's rates", lambda: measure(self.device, torch.bfloat16, width))
        return seconds_of(Work.of(prediction["work"]), rates)

    def _beside(self, folder: Path, parts: Sequence[str]) -> Running:
        """What runs beside a first step: slices of the library's kernels, and the doctor."""
        found: Running = {}
        if "stock" in parts and self.library is not None:
            count = max(1, min(10, (os.cpu_count() or 1) - 4))
            for i in range(count):
                words = ["warm-stock", str(i), str(count), _json([self.plan("stock")])]
                found[f"stock {i}"] = self._start("stock", words)
        if DOCTOR in parts:
            words = [_json([self.plan(DOCTOR)]), str(folder / "doctor.json"), str(time.time())]
            found[DOCTOR] = self._start(DOCTOR, words)
        return found

    def _ahead(self, parts: Sequence[str]) -> dict[str, Callable[[], subprocess.Popen[str]]]:
        """What starts the processes that compile ahead, those that need little memory first."""
        found: dict[str, Callable[[], subprocess.Popen[str]]] = {}
        for part in sorted(parts, key=lambda part: not part.endswith("-recompute")):
            if part in (FIRST, DOCTOR) or part.startswith("stock"):
                continue
            plan = self.plan(part)
            for micro in sorted(plan.micro) if plan.every else plan.micro[:1]:
                words = [_json([replace(plan, micro=(micro,), quick=True, ahead=True)])]
                found[f"{part} {micro}"] = functools.partial(self._start, part, words)
        return found

    def _start(
        self, part: str, words: Sequence[str], own: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        environment = {**self.environment(part), **(own or {})}
        return subprocess.Popen([*python(), *words], env=environment, stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, text=True)


def _pooled(waiting: Mapping[str, Callable[[], subprocess.Popen[str]]], end: float) -> dict[str, str]:
    """How each process of a queue ended, `AT_ONCE` of them at a time; they are stopped at `end`."""
    queue, ended = list(waiting.items()), dict[str, str]()
    running: Running = {}
    while (queue or running) and time.monotonic() < end:
        while queue and len(running) < AT_ONCE:
            name, start = queue.pop(0)
            running[name] = start()
        over = {name: process for name, process in running.items() if process.poll() is not None}
        ended |= _wait(over, end)
        running = {name: process for name, process in running.items() if name not in over}
        if not over:
            time.sleep(0.1)
    return ended | _wait(running, end) | {name: "not begun: no time left" for name, _ in queue}


def _wait(running: Running, end: float) -> dict[str, str]:
    """How each of some processes ended; they are stopped at `end`."""
    ended: dict[str, str] = {}
    for name, process in running.items():
        try:
            _, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
            ended[name] = "done" if process.returncode == 0 else (errors.strip().splitlines() or ["?"])[-1][:200]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            ended[name] = "stopped: no time left"
    return ended


def _json(plans: Sequence[PartPlan]) -> str:
    return json.dumps([asdict(plan) for plan in plans])


def read(path: Path, names: Sequence[str], error: str) -> dict[str, Result]:
    """What a process left, by part; the last one that it worked on has its error."""
    found: dict[str, Result] = json.loads(path.read_text()) if path.is_file() else {}
    if error:
        worked = [name for name in names if name in found]
        where = names[len(worked)] if len(worked) < len(names) else names[-1]
        found[where] = {**found.get(where, {}), "error": error}
        for name in names[:1]:
            found.setdefault(name, {"error": error})
    return found


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
