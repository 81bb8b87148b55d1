"""What other processes cost the demo: its wall time beside a busy process per core, over that of an idle machine.

    python benchmarks/busy.py [--rounds 2] [--steps 8] [--tasks 8] [--out results.json]

A short form of `make demo` (the same program with fewer steps and tasks) runs idle and busy in turns, each a process of
its own; a first run, which fills caches, does not count. The busy processes count numbers and share every core fairly
with the demo, so twice the idle time is what fair sharing alone costs. Bar: at most 3.5 times. The kernel says how much
of the machine others took meanwhile (all busy time less that of our own processes); an idle run that shared it with
somebody is no idle run, and the record is then called unsound and no bar is judged.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BAR = 3.5
QUIET = 0.15
"""Cores that others may use beside an idle run."""
BUSY = "while True: pass"
TICK = os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="idle and busy runs")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="busy ones")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"idle": [], "busy": []}
    with tempfile.TemporaryDirectory() as folder:
        demo(Path(folder), 1, 2)
        for number in range(options.rounds):
            for name, processes in (("idle", 0), ("busy", options.processes)):
                with beside(processes) as pids:
                    runs[name].append(measured(Path(folder), options.steps, options.tasks, pids))
                print(f"round {number + 1}, {name}: {runs[name][-1]}", flush=True)
    record = summary(runs, options)
    print(json.dumps({key: value for key, value in record.items() if key != "runs"}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["sound"] and record["ratio"] <= BAR else 1


def demo(folder: Path, steps: int, tasks: int) -> dict[str, Any]:
    """A run of the demo; its report."""
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--out", str(folder / "demo")]
    command += ["--steps", str(steps), "--tasks", str(tasks), "--set", "evaluation.prompts=2"]
    free = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "KMP_", "GOMP_"))}
    done = subprocess.run(command, cwd=ROOT, env=free, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    report: dict[str, Any] = json.loads((folder / "demo" / "report.json").read_text())
    return report


def measured(folder: Path, steps: int, tasks: int, busy: list[int]) -> dict[str, Any]:
    """Wall seconds of a run and of its parts, CPU seconds of it, and the cores that others took."""
    before, own, given = machine(), children(), [cpu_of(pid) for pid in busy]
    start = time.monotonic()
    report = demo(folder, steps, tasks)
    wall = time.monotonic() - start
    used = children() - own
    beside_it = sum(cpu_of(pid) - first for pid, first in zip(busy, given, strict=True))
    parts = {name: report[name]["seconds"] for name in ("source", "causal", "ar-trust", "diffusion-trust")}
    parts["conversion"] = report["run"]["conversion_seconds"]
    return {
        "wall": round(wall, 2), "cpu": round(used, 2), "busy_cores": round(beside_it / wall, 2),
        "others_cores": round(max(0.0, machine() - before - used - beside_it) / wall, 3),
        "parts": {name: round(value, 2) for name, value in parts.items()},
    }


@contextmanager
def beside(count: int) -> Iterator[list[int]]:
    """That many busy processes, as long as it lasts."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def machine() -> float:
    """CPU seconds that all cores have computed: user, nice, system, interrupts."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return (sum(map(int, fields[:3])) + sum(map(int, fields[5:7]))) / TICK


def children() -> float:
    """CPU seconds of this process and of those of its children that ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def summary(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians, ratios, and whether the idle runs were idle."""
    parts = runs["idle"][0]["parts"]

    def ratio(read: Any) -> float:
        return round(median(read(run) for run in runs["busy"]) / median(read(run) for run in runs["idle"]), 2)

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": f"CPU ({platform.machine()}), {len(os.sched_getaffinity(0))} cores",
        "versions": {"python": platform.python_version(),
                     **{name: metadata.version(name) for name in ("torch", "transformers")}},
        "commit": commit.stdout.strip() or None,
        "command": " ".join(["python benchmarks/busy.py", *sys.argv[1:]]),
        "busy_processes": options.processes,
        "sound": all(run["others_cores"] <= QUIET for run in (*runs["idle"], *runs["busy"])),
        "idle_seconds": median(run["wall"] for run in runs["idle"]),
        "busy_seconds": median(run["wall"] for run in runs["busy"]),
        "ratio": ratio(lambda run: run["wall"]),
        "ratio_of_parts": {name: ratio(lambda run, name=name: run["parts"][name]) for name in parts},
        "bar": BAR,
        "runs": runs,
    }


if __name__ == "__main__":
    sys.exit(main())
