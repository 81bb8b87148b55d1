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
from concurrent.futures import ThreadPoolExecutor
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
    return {"exit": process.returncode, "seconds": round(time.monotonic() - start, 1),
            "last": text.strip().splitlines()[-3:], "traceback_of_flarec": 'File "' in text and "flarec/" in text}


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


def drill(recipe: str, device: str, folder: Path) -> dict[str, Any]:
    one, two = folder / f"{recipe}-one", folder / f"{recipe}-two"
    found: dict[str, Any] = {"one": run(recipe, one, device, 1), "two": run(recipe, two, device, 2)}
    found["two_to_one"] = apart(one, two)
    out = folder / f"{recipe}-cut"
    found["parameters_in_parts"] = {"two": run(recipe, out, device, 2, "--set", "train.shard=parameters")}
    found["parameters_in_parts"] |= apart(two, out)
    for name, ranks in (("two_then_one", 1), ("two_then_two", 2)):
        out = folder / f"{recipe}-{name}"
        stopped = run(recipe, out, device, 2, "--stop-after", str(HALF))
        found[name] = {"stopped": stopped, "resumed": run(recipe, out, device, ranks, "--resume"), **apart(two, out)}
    out = folder / f"{recipe}-killed"
    found["kill"] = killed(recipe, out, device)
    found["kill"] |= {"resumed": run(recipe, out, device, 2, "--resume"), **apart(two, out)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help="repeatable; default: flare, draft, adapter")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--together", type=int, default=1, help="recipes at a time")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipes = options.recipe or ["flare", "draft", "adapter"]
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    result: dict[str, Any] = {"device": device, "torch": torch.__version__, "commit": options.commit, "steps": STEPS}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.together) as pool:
        jobs = {recipe: pool.submit(drill, recipe, options.device, Path(folder)) for recipe in recipes}
        for recipe, job in jobs.items():
            try:
                result[recipe] = job.result()
            except Exception as error:  # one recipe must not hide what the others showed
                result[recipe] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
