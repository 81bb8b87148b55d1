"""`flarec convert` on two ranks as users launch it, beside one process: `python -m tools.ranks_drill --device cuda`.

Of each recipe: one process, two ranks, two ranks that stop half-way and go on as one, as two, and two of which one
gets kill -9 and which go on; and two whose parameters are in parts (`train.shard`). All of them in float32 with the
bundled model, so that what differs is the order of sums.
Compared are losses (largest relative difference of a step) and weights (largest difference to the largest element).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flarec.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
STEPS, HALF = 8, 4
LIMIT = 300
CHOSEN = ["optimizer.precision=float32", "optimizer.batch_rows=8", "optimizer.micro_rows=4", "optimizer.warmup_steps=2",
          f"evaluation.every={STEPS}", "evaluation.prompts=4", "evaluation.max_new_tokens=8", f"save.every={HALF // 2}"]


def command(recipe: str, out: Path, device: str, ranks: int, more: tuple[str, ...]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "localhost:0"] if ranks > 1 else []
    chosen = [part for setting in CHOSEN for part in ("--set", setting)]
    source = ["examples/tiny/model", "--data", "examples/tiny/data/text.jsonl", "--recipe", recipe,
              "--max-length", "128", "--steps", str(STEPS), "--device", device, "--out", str(out), *chosen, *more]
    return [sys.executable, *launcher, "-m", "flarec", "convert", *source]


def launched(recipe: str, out: Path, device: str, ranks: int, *more: str) -> subprocess.Popen[str]:
    words = command(recipe, out, device, ranks, more)
    return subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(recipe: str, out: Path, device: str, ranks: int, *more: str) -> dict[str, Any]:
    start, process = time.monotonic(), launched(recipe, out, device, ranks, *more)
    text, _ = process.communicate(timeout=LIMIT)
    last = {"last": text.strip().splitlines()[-3:]} if process.returncode else {}
    return {"exit": process.returncode, "seconds": round(time.monotonic() - start, 1), **last,
            "traceback_of_flarec": 'File "' in text and "flarec/" in text}


def killed(recipe: str, out: Path, device: str) -> dict[str, Any]:
    """kill -9 of the second rank once the first save is there."""
    process, partial = launched(recipe, out, device, 2), out.with_name(f"{out.name}.partial")
    deadline = time.monotonic() + LIMIT
    while not (partial / "latest").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(pid) for pid in _children(process.pid)]
    second = next((pid for pid in workers if "RANK=1" in _environment(pid)), None)
    if second is None:
        process.kill()
        return {"exit": process.wait(), "killed": None, "last": (process.communicate()[0] or "").splitlines()[-5:]}
    start = time.monotonic()
    os.kill(second, signal.SIGKILL)
    text, _ = process.communicate(timeout=LIMIT)
    said = [line for line in text.splitlines() if re.search(r"rank 1 \(process", line)]
    return {"exit": process.returncode, "seconds_to_the_end": round(time.monotonic() - start, 1), "said": said[:1],
            "out_is_there": out.exists(), "left": sorted(path.name for path in partial.iterdir())}


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")


def apart(one: Path, two: Path) -> dict[str, Any]:
    """How far two conversions are from each other."""
    kind = "adapter/adapter_model.safetensors" if (one / "adapter").exists() else "model.safetensors"
    first, second = (load_file(folder / kind) for folder in (one, two))
    weights = max(float((first[n] - second[n]).abs().max() / first[n].abs().max().clamp_min(1e-30)) for n in first)
    logs = [[line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line] for folder in (one, two)]
    pairs = list(zip(*logs, strict=True))
    losses = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in pairs)
    return {"weights": weights, "losses": losses, "steps": len(pairs), "bit_for_bit": all(
        torch.equal(first[name], second[name]) for name in first)}


def resumed(recipe: str, device: str, folder: Path, name: str, ranks: int) -> dict[str, Any]:
    """Two ranks stop half-way; `ranks` go on."""
    out = folder / f"{recipe}-{name}"
    stopped = run(recipe, out, device, 2, "--stop-after", str(HALF))
    return {"stopped": stopped, "resumed": run(recipe, out, device, ranks, "--resume")}


def survived(recipe: str, device: str, folder: Path) -> dict[str, Any]:
    """One of two ranks is killed; two go on."""
    out = folder / f"{recipe}-kill"
    return {**killed(recipe, out, device), "resumed": run(recipe, out, device, 2, "--resume")}


def launches(recipe: str, device: str, folder: Path, pool: ThreadPoolExecutor) -> dict[str, Future[dict[str, Any]]]:
    """They do not wait for each other; what is resumed waits for its own first part alone."""
    one, two = folder / f"{recipe}-one", folder / f"{recipe}-two"
    cut = folder / f"{recipe}-parameters_in_parts"
    return {
        "one": pool.submit(run, recipe, one, device, 1),
        "two": pool.submit(run, recipe, two, device, 2),
        "parameters_in_parts": pool.submit(run, recipe, cut, device, 2, "--set", "train.shard=parameters"),
        "two_then_one": pool.submit(resumed, recipe, device, folder, "two_then_one", 1),
        "two_then_two": pool.submit(resumed, recipe, device, folder, "two_then_two", 2),
        "kill": pool.submit(survived, recipe, device, folder),
    }


def compared(recipe: str, folder: Path, jobs: dict[str, Future[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """What is known so far, after every comparison."""
    one, two = folder / f"{recipe}-one", folder / f"{recipe}-two"
    found: dict[str, Any] = {name: jobs.pop(name).result() for name in ("one", "two")}
    found["two_to_one"] = apart(one, two)
    yield found
    for name, job in jobs.items():
        found[name] = job.result() | apart(two, folder / f"{recipe}-{name}")
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help="repeatable; default: flare, draft, adapter")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--together", type=int, default=1, help="launches at a time")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipes = options.recipe or ["flare", "draft", "adapter"]
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    result: dict[str, Any] = {"device": device, "torch": torch.__version__, "commit": options.commit, "steps": STEPS}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.together) as pool:
        started = {recipe: launches(recipe, options.device, Path(folder), pool) for recipe in recipes}
        drills = {recipe: compared(recipe, Path(folder), jobs) for recipe, jobs in started.items()}
        open_ = set(recipes)
        while open_:
            for recipe in sorted(open_):
                try:
                    result[recipe] = next(drills[recipe])
                except StopIteration:
                    open_.remove(recipe)
                except Exception as error:  # one recipe must not hide what the others showed
                    result[recipe] = {**result.get(recipe, {}), "error": f"{type(error).__name__}: {error}"}
                    open_.remove(recipe)
                if options.out:  # a run that is cut short leaves what it has seen
                    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
