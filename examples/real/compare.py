"""Which adapter drafts best? Arms of `arms.py` on one model, each converted and measured, several at a time.

    python examples/real/compare.py SOURCE --data a0.jsonl --data a1.jsonl --prompts choose.jsonl --out compare.json \
        [--steps 100 --seeds 3 --workers 6 --devices 0,1 --time-limit 540]

Every arm is a `flarec convert` and an `examples/real/measure.py` of its checkpoint. All arms of a seed come before
those of the next one. Processes share their devices: the seconds of an arm are no speed. The file is written after
every arm, and a later call with the same file goes on with what is missing. What is chosen here has to be reported on
other prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import ARMS, overrides

MEASURE = Path(__file__).with_name("measure.py")
TEMPERATURES = ("T=0", "T=1")


def commands(options: argparse.Namespace, arm: str, seed: int, folder: Path) -> list[list[str]]:
    """Of one arm: the conversion, and the measurement of its checkpoint."""
    out = folder / "checkpoint"
    settings = [
        f"optimizer.batch_rows={options.rows}", f"optimizer.micro_rows={options.micro}", "data.max_length=512",
        "evaluation.every=0", "train.memory=keep", "train.compile=off", *overrides(arm),
    ]
    convert = [sys.executable, "-m", "flarec", "convert", str(options.source), "--recipe", "adapter", "--out", str(out),
               "--overwrite", "--steps", str(options.steps), "--seed", str(seed), "--device", options.device]
    convert += [part for data in options.data for part in ("--data", str(data))]
    convert += [part for setting in settings for part in ("--set", setting)]
    measure = [sys.executable, str(MEASURE), str(out), "--prompts", str(options.prompts), "--limit", str(options.limit),
               "--batch", str(options.limit), "--max-new-tokens", str(options.max_new_tokens), "--out",
               str(folder / "measured.json"), *(() if options.chat else ("--no-chat",))]
    return [convert, measure]


def run_arm(options: argparse.Namespace, arm: str, seed: int, device: str, until: float) -> dict[str, Any]:
    """Tokens per forward of one arm, or what went wrong."""
    folder = options.work / f"{arm}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": device} if device else {})}
    start, seconds = time.monotonic(), list[float]()
    try:
        for command in commands(options, arm, seed, folder):
            limit = max(1.0, until - time.monotonic())
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
            if done.returncode:
                return {"error": " ".join((done.stderr or done.stdout).strip().splitlines()[-1:])[:400]}
            seconds.append(round(time.monotonic() - start - sum(seconds), 1))
        found = json.loads((folder / "measured.json").read_text())
        rows = {name: {part: found[name][part] for part in ("all", "loop-free", "equal")} for name in TEMPERATURES}
        return {"arm": arm, "seed": seed, "overrides": overrides(arm), "seconds": seconds, **rows}
    except subprocess.TimeoutExpired:
        return {"error": "no time left"}
    finally:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        shutil.rmtree(folder / "checkpoint.partial", ignore_errors=True)


def compared(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per arm: tokens per forward (loop-free answers) of every seed, and differences to `base` of the same seed."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs.values():
        for name in TEMPERATURES if "error" not in run else ():
            if free := run[name]["loop-free"]:
                values.setdefault(run["arm"], {}).setdefault(name, {})[run["seed"]] = free["tokens_per_forward"]
    base = values.get("base", {})
    return {
        arm: {name: _row(found, base.get(name, {})) for name, found in each.items()} for arm, each in values.items()
    }


def _row(found: dict[int, float], base: dict[int, float]) -> dict[str, Any]:
    seeds = sorted(found)
    apart = [found[seed] - base[seed] for seed in seeds if seed in base]
    return {"seeds": [found[seed] for seed in seeds], "mean": statistics.fmean(found.values()), "to_base": apart}


def run_all(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Workers take the next arm that has no result."""
    until, lock = time.monotonic() + options.time_limit, threading.Lock()
    names = options.only or list(ARMS)
    waiting = [(arm, seed) for seed in range(options.seeds) for arm in names
               if "error" in record["runs"].get(f"{arm} {seed}", {"error": ""})]
    longest = 0.0

    def work(device: str) -> None:
        nonlocal longest
        while True:
            with lock:
                if not waiting or time.monotonic() + 0.8 * longest > until:
                    return
                arm, seed = waiting.pop(0)
            start = time.monotonic()
            found = run_arm(options, arm, seed, device, until)
            with lock:
                longest = max(longest, time.monotonic() - start)
                record["runs"][f"{arm} {seed}"] = found
                record["arms"] = compared(record["runs"])
                options.out.write_text(json.dumps(record, indent=1) + "\n")
            print(f"{arm} {seed}: {told(found)}", flush=True)

    devices = options.devices.split(",") if options.devices else [""]
    threads = [threading.Thread(target=work, args=(devices[n % len(devices)],)) for n in range(options.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def told(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"error: {found['error']}"
    values = (found[name]["loop-free"] or found[name]["all"] for name in TEMPERATURES)
    return ", ".join(f"{value['tokens_per_forward']:.3f}" for value in values) + f" in {found['seconds']} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--data", type=Path, action="append", required=True, help="answers to learn from (repeatable)")
    parser.add_argument("--prompts", type=Path, required=True, help="of other packages, to measure on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/compare"))
    parser.add_argument("--only", action="append", choices=ARMS, default=[])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=128, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--devices", default="", help="numbers of GPUs, joined by commas, that workers take in turn")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds")
    parser.add_argument("--commit", default="")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {"runs": {}}
    if options.out.exists():
        record = json.loads(options.out.read_text())
    said = {"source": options.source.name, "prompts": options.prompts.name,
            "data": [path.name for path in options.data], "steps": options.steps,
            "rows": options.rows, "limit": options.limit, "max_new_tokens": options.max_new_tokens,
            "commit": options.commit}
    if record["runs"] and {key: record.get(key) for key in said} != said:
        parser.error(f"{options.out} was measured with other settings; give another --out")
    record = {**said, "command": " ".join(["python examples/real/compare.py", *sys.argv[1:]]), **record}
    run_all(options, record)
    return int(any("error" in run for run in record["runs"].values()))


if __name__ == "__main__":
    sys.exit(main())
