"""Which adapter drafts best? Arms of `arms.py` on one model, each converted and measured, several at a time.

    python examples/real/compare.py SOURCE --data a0.jsonl --data a1.jsonl --prompts choose.jsonl --out compare.json \
        [--steps 100 --seeds 3 --workers 6 --devices 0,1 --time-limit 540]

Every arm is a `flarec convert` and an `examples/real/measure.py` of its checkpoint. All arms of a seed come before
those of the next one. Processes share their devices: the seconds of an arm are no speed. The file is written after
every arm, and a later call with the same file goes on with what is missing. What is chosen here has to be reported on
other prompts. Arms with data of their own (`own`, `given`) take it from --data-of; without --only, arms without data
are left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import commands
from arms import ARMS, BESIDE, DATA, overrides

TEMPERATURES = ("T=0", "T=1")


def both(options: argparse.Namespace, arm: str, seed: int, folder: Path) -> list[list[str]]:
    """Of one arm: the conversion, and the measurement of its checkpoint."""
    out = folder / "checkpoint"
    settings = [
        f"optimizer.batch_rows={options.rows}", f"optimizer.micro_rows={options.micro}", "data.max_length=512",
        "evaluation.every=0", "train.memory=keep", "train.compile=off", *overrides(arm),
    ]
    convert = commands.flarec("convert", options.source, "--recipe", "adapter", "--out", out, "--overwrite", "--steps",
                              options.steps, "--seed", seed, "--device", options.device)
    convert += [part for data in data_of(options, arm) for part in ("--data", str(data))]
    convert += [part for setting in settings for part in ("--set", setting)]
    measure = commands.script(
        "measure.py", out, "--prompts", options.prompts, "--limit", options.limit, "--batch", options.limit,
        "--max-new-tokens", options.max_new_tokens, "--out", folder / "measured.json",
        *(() if options.chat else ("--no-chat",)),
    )
    return [convert, measure]


def data_of(options: argparse.Namespace, arm: str) -> list[Path]:
    """What an arm learns from: the files of its key, or those of all arms without one."""
    return options.data_of.get(DATA[arm], []) if arm in DATA else options.data


def keyed(given: Sequence[str]) -> dict[str, list[Path]]:
    """`KEY=FILE`, repeatable, as files by key. Raises `ValueError`."""
    found: dict[str, list[Path]] = {}
    for text in given:
        key, equals, path = text.partition("=")
        if not equals or key not in DATA.values():
            raise ValueError(f"--data-of {text}: give KEY=FILE with a key of {', '.join(sorted(set(DATA.values())))}")
        found.setdefault(key, []).append(Path(path))
    return found


def run_arm(options: argparse.Namespace, arm: str, seed: int, device: str, until: float) -> dict[str, Any]:
    """Tokens per forward of one arm, or what went wrong."""
    folder = options.work / f"{arm}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    seconds = list[float]()
    try:
        for command in both(options, arm, seed, folder):
            ran = commands.run(command, until - time.monotonic(), device=device)
            if ran.error:
                return {"error": ran.error}
            seconds.append(round(ran.seconds, 1))
        found = json.loads((folder / "measured.json").read_text())
        rows = {name: {part: found[name][part] for part in ("all", "loop-free", "equal")} for name in TEMPERATURES}
        return {"arm": arm, "seed": seed, "overrides": overrides(arm), "seconds": seconds, **rows}
    finally:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        shutil.rmtree(folder / "checkpoint.partial", ignore_errors=True)


def compared(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Per arm: tokens per forward (loop-free answers) of every seed, and its differences to `base`, or what `BESIDE`
    says, of the same seed."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs.values():
        for name in TEMPERATURES if "error" not in run else ():
            if free := run[name]["loop-free"]:
                values.setdefault(run["arm"], {}).setdefault(name, {})[run["seed"]] = free["tokens_per_forward"]
    return {
        arm: {name: _row(found, values.get(BESIDE.get(arm, "base"), {}).get(name, {})) for name, found in each.items()}
        for arm, each in values.items()
    }


def _row(found: dict[int, float], base: dict[int, float]) -> dict[str, Any]:
    seeds = sorted(found)
    apart = [found[seed] - base[seed] for seed in seeds if seed in base]
    return {"seeds": [found[seed] for seed in seeds], "mean": statistics.fmean(found.values()), "to_base": apart}


def run_all(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Workers take the next arm that has no result."""
    until, lock = time.monotonic() + options.time_limit, threading.Lock()
    names = options.only or [arm for arm in ARMS if data_of(options, arm)]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    waiting = [(arm, seed) for seed in seeds for arm in names
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
    parser.add_argument("--data", type=Path, action="append", default=[], help="answers to learn from (repeatable)")
    parser.add_argument("--data-of", action="append", default=[], metavar="KEY=FILE",
                        help="what arms with data of their own learn from instead (arms.py: DATA; repeatable)")
    parser.add_argument("--prompts", type=Path, required=True, help="of other packages, to measure on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/compare"))
    parser.add_argument("--only", action="append", choices=ARMS, default=[])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=128, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--devices", default="", help="numbers of GPUs, joined by commas, that workers take in turn")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time-limit", type=float, default=540.0, help="seconds")
    parser.add_argument("--commit", default="")
    options = parser.parse_args(arguments)
    if missing := [str(path) for path in (options.source, options.prompts) if not path.exists()]:
        parser.error(f"{', '.join(missing)} does not exist")
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: give 1 or more")
    try:
        options.data_of = keyed(options.data_of)
    except ValueError as error:
        parser.error(str(error))
    for arm in options.only or ():
        if not data_of(options, arm):
            parser.error(f"{arm} has no data; give {f'--data-of {DATA[arm]}=FILE' if arm in DATA else '--data FILE'}")
    if not options.data and not options.data_of:
        parser.error("give --data or --data-of")
    record: dict[str, Any] = {"runs": {}}
    if options.out.exists():
        record = json.loads(options.out.read_text())
    said = {"source": options.source.name, "prompts": options.prompts.name,
            "data": [path.name for path in options.data],
            **{f"data of {key}": [path.name for path in paths] for key, paths in options.data_of.items()},
            "steps": options.steps, "rows": options.rows, "limit": options.limit,
            "max_new_tokens": options.max_new_tokens, "commit": options.commit}
    if record["runs"] and {key: record.get(key) for key in said} != said:
        parser.error(f"{options.out} was measured with other settings; give another --out")
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python examples/real/compare.py", *words])
    record = {**commands.machine(), **said, "command": command, **record}
    run_all(options, record)
    return int(any("error" in run for run in record["runs"].values()))


if __name__ == "__main__":
    sys.exit(main())
