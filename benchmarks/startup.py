"""What it costs to start: CPU seconds of a one-token `flarec generate`, less those of importing torch and transformers.

    python benchmarks/startup.py [--against CHECKOUT] [--checkpoint DIR] [--runs 7] [--out results.json]

Every run is a process of its own, and its CPU seconds (user and system, as the kernel counted them) are what is
reported: the wall time of a busy machine says little. Two states of the program cache are measured: `warm`, where the
model's graph is stored, and `cold`, an empty cache directory for each run. `--against` names another checkout with its
own `.venv`; the trees then take turns, so that both meet the same machine. The bare process is `import torch,
transformers` with the tree's interpreter. Without `--checkpoint` the tiny model is converted in one step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPT = ("w3 w4", "--max-new-tokens", "1")
BARE = "import torch, transformers"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""Byte code is kept, as for every user."""
BARS = {"warm": 0.6, "cold": 0.75}
"""Most that this tree may cost of the one it is compared with."""


def cpu_seconds(command: list[str], environment: dict[str, str]) -> float:
    """User and system seconds of a process and its children."""
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    notices = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{notices.decode(errors='replace')}")
    return used.ru_utime + used.ru_stime


class Tree:
    """A checkout with its environment, and the program caches that its runs see."""

    def __init__(self, root: Path, checkpoint: Path, caches: Path, threads: int) -> None:
        self.bin = root / ".venv" / "bin"
        self.caches = caches
        self.threads = threads
        self.commands = {
            "bare": [str(self.bin / "python"), "-c", BARE],
            "warm": [str(self.bin / "flarec"), "generate", str(checkpoint), *PROMPT],
        }
        self.commands["cold"] = self.commands["warm"]
        self.commit = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD")
        self.changed = bool(_output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"))
        self.seconds: dict[str, list[float]] = {name: [] for name in self.commands}

    def run(self, what: str) -> None:
        with tempfile.TemporaryDirectory(dir=self.caches) as empty:
            cache = empty if what == "cold" else str(self.caches / "warm")
            environment = ENVIRONMENT | {"FLAREC_CACHE_DIR": cache, "OMP_NUM_THREADS": str(self.threads)}
            self.seconds[what].append(cpu_seconds(self.commands[what], environment))

    def warm_up(self) -> None:
        """Compile the byte code, fill the program cache and bring the files into memory."""
        for what in self.commands:
            self.run(what)
        self.seconds = {name: [] for name in self.commands}

    def summary(self) -> dict[str, Any]:
        middle = {name: median(values) for name, values in self.seconds.items()}
        return {
            "commit": self.commit + (" with changes" if self.changed else ""),
            "median": {name: round(value, 3) for name, value in middle.items()},
            "net": {name: round(middle[name] - middle["bare"], 3) for name in BARS},
            "runs": {name: [round(value, 3) for value in values] for name, values in self.seconds.items()},
        }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def convert(folder: Path, threads: int, root: Path) -> Path:
    """The tiny model after one step of training: what a decode starts from, not what it says, is measured here.

    `root`: the checkout that converts. The older one of two: what it writes, both of them read.
    """
    out = folder / "checkpoint"
    tiny = root / "examples" / "tiny"
    command = [
        str(root / ".venv" / "bin" / "flarec"), "convert", str(tiny / "model"),
        "--data", str(tiny / "data/train.jsonl"),
        "--recipe", str(tiny / "recipe.toml"), "--steps", "1", "--out", str(out),
    ]
    cpu_seconds(command, ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)})
    return out


def report(trees: dict[str, Tree]) -> Iterator[str]:
    for name, tree in trees.items():
        found = tree.summary()
        yield f"{name} ({found['commit']}): bare {found['median']['bare']:.2f} s, " + ", ".join(
            f"{state} {found['median'][state]:.2f} s (net {found['net'][state]:.2f} s)" for state in BARS
        )
    if "other" in trees:
        for state, ratio in ratios(trees).items():
            verdict = "met" if ratio <= BARS[state] else "MISSED"
            yield f"{state}: {ratio:.2f} of the other's, bar {BARS[state]} {verdict}"


def ratios(trees: dict[str, Tree]) -> dict[str, float]:
    own, other = (trees[name].summary()["net"] for name in ("this", "other"))
    return {state: round(own[state] / other[state], 3) for state in BARS}


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds of a start.")
    parser.add_argument("--against", type=Path, help="another checkout with its own .venv")
    parser.add_argument(
        "--checkpoint", type=Path, help="a converted checkpoint; without one the tiny model is converted"
    )
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flarec-startup-") as folder:
        work = Path(folder)
        checkpoint = (options.checkpoint or convert(work, options.threads, options.against or ROOT)).resolve()
        roots = {"this": ROOT} | ({"other": options.against.resolve()} if options.against else {})
        trees = {}
        for name, root in roots.items():
            (work / name).mkdir()
            trees[name] = Tree(root, checkpoint, work / name, options.threads)
            trees[name].warm_up()
        for _ in range(options.runs):
            for what in ("bare", *BARS):
                for tree in trees.values():
                    tree.run(what)
    for line in report(trees):
        print(line)
    if options.out is not None:
        result = {
            "device": f"CPU ({platform.machine()}), {options.threads} threads",
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "safetensors")}
            | {"python": platform.python_version()},
            "command": f"python benchmarks/startup.py --runs {options.runs} --threads {options.threads}"
            + (" --against OTHER" if options.against else ""),
            "bare": BARE,
            "generate": " ".join(("flarec", "generate", "CHECKPOINT", *PROMPT)),
            "unit": "CPU seconds, user and system",
            **{name: tree.summary() for name, tree in trees.items()},
        } | ({"ratio": ratios(trees)} if "other" in trees else {})
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
