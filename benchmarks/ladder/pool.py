"""Arms side by side: processes that each take the next arm that nobody took, until the time is up.

A small model waits for launches, not for arithmetic, so that many processes share a device. What is done lies in one
folder, a file per arm; a file appears whole, so that a run that was stopped goes on with what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.ladder.arms import Arm
from benchmarks.ladder.measure import Sizes, measured
from benchmarks.ladder.source import mix


def run_pool(command: list[str], work: Path, *, workers: int, devices: list[str], until: float, collect: Any) -> None:
    """Start workers (this program with `command`), and `collect()` every few seconds; end those that run at `until`."""
    processes = []
    for number in range(workers):
        device = devices[number % len(devices)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if device != "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = device
        log = (work / f"worker-{number}.log").open("ab")
        words = [sys.executable, "-m", "benchmarks.ladder", *command]
        processes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True))
    try:
        while any(process.poll() is None for process in processes) and time.time() < until:
            time.sleep(1)
            collect()
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        collect()


def work_on(
    arms: list[Arm], work: Path, data: Path, source: Path, *, settings: dict[str, Any], sizes: Sizes, device: str,
    until: float,
) -> None:
    """What a worker does. An arm is claimed by a file; one that fails leaves what it said."""
    longest = 0.0
    for arm in arms:
        place = result_of(work, arm)
        if place.exists() or time.time() + 0.8 * longest > until:
            continue
        if not claimed(work, name_of(arm)) or place.exists():  # done between the two looks
            continue
        start = time.time()
        try:
            found = one(arm, work, data, source, settings=settings, sizes=sizes, device=device)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:600]}
        longest = max(longest, time.time() - start)
        part = place.with_suffix(f".{os.getpid()}")
        known = {"arm": arm.name, "seed": arm.seed, "seconds": round(time.time() - start, 1)}
        part.write_text(json.dumps({**known, **found}))
        os.replace(part, place)


def one(
    arm: Arm, work: Path, data: Path, source: Path, *, settings: dict[str, Any], sizes: Sizes, device: str
) -> dict[str, Any]:
    """Convert and measure."""
    import flarec
    from flarec.train.metrics import read_metrics
    from flarec.train.progress import Reporter

    folder = work / "checkpoints" / name_of(arm)
    start = time.perf_counter()
    steps, rows = settings["steps"], settings["rows"]
    keys = [
        f"optimizer.steps={steps}", f"optimizer.batch_rows={rows}", f"optimizer.micro_rows={rows}",
        "optimizer.schedule=linear", f"optimizer.warmup_steps={max(1, steps // 15)}",
        f"data.max_length={settings['length']}", "evaluation.every=0",
        f"save.every={steps + 1}", "train.compile=off", "train.memory=keep", *arm.overrides,
    ]
    try:
        made = flarec.convert(
            source, mix(data, "arms"), recipe=arm.recipe, out=folder, overrides=keys, device=device, seed=arm.seed,
            overwrite=True, reporter=Reporter(),
        )
        converted = time.perf_counter() - start
        seen = [entry for entry in read_metrics(made / "metrics.jsonl") if "ar_loss" in entry]
        model = flarec.load(made, device=device, graphs="off", compile="off")
        modes = ("causal",) if arm.name == "ar" else ("causal", "ar-trust", "diffusion-trust")
        found = measured(model, data, sizes, modes)
        assert model.manifest is not None
        return {
            **found, "convert_seconds": round(converted, 1), "last_metrics": seen[-1] if seen else None,
            "readouts": dict(model.manifest.decode.readouts), "recipe": arm.recipe, "overrides": list(arm.overrides),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def result_of(work: Path, arm: Arm) -> Path:
    """Where an arm's result lies."""
    return work / "arms" / f"{name_of(arm)}.json"


def name_of(arm: Arm) -> str:
    """Of its files."""
    return arm.key.replace(" ", "-")


def claimed(work: Path, name: str) -> bool:
    """Whether this process is the one that does something; what a process that has ended claimed is free again.

    Several runs on one machine may share a folder, one for each of its devices.
    """
    place = work / "claims" / name
    own = place.with_suffix(f".{os.getpid()}")
    own.write_text(str(os.getpid()))
    try:
        for _ in range(2):
            try:
                os.link(own, place)  # appears whole
                return True
            except FileExistsError:
                if _runs(int(place.read_text())):
                    return False
                place.unlink(missing_ok=True)
    except FileNotFoundError:  # another one has just freed it, and takes it
        return False
    finally:
        own.unlink()
    return False


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
