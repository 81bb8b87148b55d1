"""One conversion of a real model, stopped once and resumed, with its metrics and probes in a record.

    python examples/real/resumed.py SOURCE --data a0.jsonl --data a1.jsonl --prompts out/prompts/report.jsonl \
        --steps 1000 --out resumed.json [--set adapter.rank=128 --time-limit 590 --commit ID]

`flarec convert --stop-after` ends half way, `flarec convert --resume` goes on in a new process, and
`examples/real/measure.py` measures the checkpoint on prompts that chose nothing. The record holds every step's metrics,
every probe on held-out documents, and what was checked of the log: steps follow each other from 1 to the last one, the
resumed run left alone what was logged before, every probe is there, and the learning rate is that of one schedule. Exit
code 1 if something of that does not hold.

If the pace of the first part says that the rest does not fit into --time-limit, the resumed run is given fewer steps;
the record says how many. If it does not fit all the same, `flarec finish` writes what was saved last, and that is a
problem in the record. It is written after every part, so that a call that is cut leaves what there is.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import commands

SETTINGS = (
    "adapter.rank=64", "optimizer.lr=3e-3", "optimizer.batch_rows=16", "optimizer.micro_rows=8",
    "diffusion.block_size=5", "diffusion.grids=3", "data.max_length=512", "evaluation.prompts=32",
    "evaluation.max_new_tokens=64", "train.memory=keep", "train.compile=on",
)
"""What drafted best before (docs/objectives.md), for 16 rows of 512 tokens a step; --set replaces or adds to it."""
LEFT_OUT = ("diffusion_losses", "step")
"""Of a step's metrics, in columns."""
SAFETY = 1.15
"""Times the pace of the first part: probes and saves are not evenly spread."""


def settings(options: argparse.Namespace) -> list[str]:
    """`--set` of both parts; a later one of a key replaces an earlier one."""
    given = (*SETTINGS, f"evaluation.every={options.every}", *options.set)
    chosen = dict(setting.split("=", 1) for setting in given)
    return [f"{key}={value}" for key, value in chosen.items()]


def conversion(options: argparse.Namespace, checkpoint: Path, steps: int, *more: object) -> list[str]:
    """The command of a part."""
    words: list[object] = ["convert", options.source, "--recipe", "adapter", "--out", checkpoint, "--steps", steps]
    words += ["--seed", options.seed, "--device", options.device]
    words += [part for data in options.data for part in ("--data", data)]
    words += [part for setting in settings(options) for part in ("--set", setting)]
    return commands.flarec(*words, *more)


def log_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def steps_of(lines: Sequence[str]) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, lines) if "evaluation" not in line]


def probes_of(lines: Sequence[str]) -> list[dict[str, Any]]:
    """{"step", and what was measured on held-out documents}, in order."""
    found = (line for line in map(json.loads, lines) if "evaluation" in line)
    return [{"step": line["step"], **line["evaluation"]} for line in found]


def faults(before: Sequence[str], after: Sequence[str], steps: int, every: int) -> list[str]:
    """What is wrong with the log of a run: `before` at the stop, `after` at the end. Empty if nothing is."""
    found = []
    numbers = [line["step"] for line in steps_of(after)]
    if numbers != list(range(1, steps + 1)):
        found.append(f"the log has {len(numbers)} steps, not 1 to {steps} in order")
    if list(after[: len(before)]) != list(before):
        found.append("the resumed run changed what was logged before the stop")
    if not 0 < len(before) < len(after):
        found.append(f"{len(before)} of {len(after)} lines were logged before the stop")
    wanted = sorted({0, *range(every, steps, every), steps}) if every else []
    probed = [probe["step"] for probe in probes_of(after)]
    if probed != wanted:
        found.append(f"held-out probes are at {probed}, not at {wanted}")
    bad = [line["step"] for line in steps_of(after) if not math.isfinite(line["loss"])]
    if bad:
        found.append(f"the loss is not finite at step {bad[0]}")
    return found


def schedule_faults(after: Sequence[str], stopped: int, planned: int, steps: int) -> list[str]:
    """Of a linear decay that nobody shortened: behind the peak rates fall by the same amount, across the stop too."""
    rates = {line["step"]: line["lr"] for line in steps_of(after)}
    if steps != planned or len(rates) != steps:
        return []
    peak = max(rates.values())
    start = max(step for step, rate in rates.items() if math.isclose(rate, peak, rel_tol=1e-9))
    falls = [rates[step] - rates[step + 1] for step in range(start, steps)]
    even = all(math.isclose(one, other, rel_tol=1e-6) for one, other in pairwise(falls))
    return [] if even else [f"the learning rate is not that of one schedule around the stop at {stopped}"]


def columns(lines: Sequence[str]) -> dict[str, list[Any]]:
    """Step metrics by name, numbers to five digits: a line per name in the record."""
    table: dict[str, list[Any]] = {}
    for line in steps_of(lines):
        for name, value in line.items():
            if name not in LEFT_OUT:
                table.setdefault(name, []).append(_short(value))
    return table


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def fitting(lines: Sequence[str], seconds: float, stopped: int, steps: int, left: float) -> int:
    """How many steps the whole run can have if `left` seconds are left; `seconds` the first part took.

    What took the first part longer than its median step (loading, compiling) is expected once more.
    """
    pace = statistics.median(line["seconds"] for line in steps_of(lines))
    probing = sum(probe["seconds"] for probe in probes_of(lines)) / stopped
    start = max(0.0, seconds - stopped * (pace + probing))
    room = int((left - start) / (SAFETY * (pace + probing)))
    return min(steps, max(stopped + 1, stopped + room))


def write(record: dict[str, Any], path: Path) -> None:
    """A key per line; of tables and lists of tables an entry per line."""
    rows = []
    for key, value in record.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(item)}" for name, item in value.items())
            text = f"{{\n{inner}\n }}"
        elif isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
        rows.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def convert(options: argparse.Namespace, record: dict[str, Any]) -> bool:
    """Both parts; whether there is a checkpoint."""
    until, checkpoint = time.monotonic() + options.time_limit, options.work / "checkpoint"
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    command = conversion(options, checkpoint, options.steps, "--stop-after", record["stopped_after"], "--overwrite")
    first = commands.run(command, options.time_limit, show=True)
    before = log_of(partial / "metrics.jsonl")
    record["commands"].append(first.command)
    record["seconds"]["first part"] = round(first.seconds, 1)
    if first.error:
        record["problems"].append(f"first part: {first.error}")
        return False
    left = until - time.monotonic()
    record["steps"] = fitting(before, first.seconds, record["stopped_after"], options.steps, left)
    second = commands.run(conversion(options, checkpoint, record["steps"], "--resume"), left, show=True)
    after = log_of(checkpoint / "metrics.jsonl")
    record["commands"].append(second.command)
    record["seconds"]["resumed part"] = round(second.seconds, 1)
    there = True
    record["seconds"]["conversion"] = round(first.seconds + second.seconds, 1)
    if second.error:
        record["problems"].append(f"resumed part: {second.error}")
        command = commands.flarec("finish", partial, "--overwrite", "--device", options.device)
        finished = commands.run(command, options.measure_limit)
        record["commands"].append(finished.command)
        there = not finished.error
        after = log_of((checkpoint if there else partial) / "metrics.jsonl")
        record["steps"] = len(steps_of(after))
    else:
        record["problems"] += faults(before, after, record["steps"], options.every)
        record["problems"] += schedule_faults(after, record["stopped_after"], options.steps, record["steps"])
    losses = [probe["ar_loss"] for probe in probes_of(after)]
    record["clean_tokens"] = sum(line["clean_tokens"] for line in steps_of(after))
    record["probes' AR losses are equal"] = len(set(losses)) == 1  # the adapter cannot change the clean stream
    record["probes"] = [{name: _short(value) for name, value in probe.items()} for probe in probes_of(after)]
    record["metrics"] = columns(after)
    return there


def measure(options: argparse.Namespace, record: dict[str, Any]) -> None:
    out = options.work / "measured.json"
    command = commands.script(
        "measure.py", options.work / "checkpoint", "--prompts", options.prompts, "--limit", options.limit, "--batch",
        min(options.limit, 128), "--max-new-tokens", options.max_new_tokens, "--out", out,
        *(() if options.chat else ("--no-chat",)),
    )
    ran = commands.run(command, options.measure_limit, show=True)
    record["commands"].append(ran.command)
    record["seconds"]["measuring"] = round(ran.seconds, 1)
    if ran.error:
        record["problems"].append(f"measuring: {ran.error}")
    else:
        found = json.loads(out.read_text())
        record["measured"] = {name: found[name] for name in ("T=0", "T=1")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--data", type=Path, action="append", required=True, help="answers to learn from (repeatable)")
    parser.add_argument("--prompts", type=Path, required=True, help="of other packages, to measure on")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--stop-after", type=int, help="default: half of the steps")
    parser.add_argument("--every", type=int, default=100, help="steps between probes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe (repeatable)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=int, default=256, help="prompts to measure on")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--time-limit", type=float, default=590.0, help="seconds of the conversion, both parts")
    parser.add_argument("--measure-limit", type=float, default=120.0, help="seconds")
    parser.add_argument("--work", type=Path, default=Path("out/resumed"))
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    stop = options.stop_after or options.steps // 2
    if not 0 < stop < options.steps:
        parser.error(f"--stop-after {stop} is no step before the last one, {options.steps}")
    options.work.mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:] if arguments is None else arguments
    record: dict[str, Any] = {
        **commands.machine(), "commit": options.commit,
        "command": " ".join(["python examples/real/resumed.py", *map(str, words)]), "commands": [],
        "source": {"name": options.source.name,
                   "weights": [commands.described(path) for path in sorted(options.source.glob("*.safetensors"))]},
        "data": [commands.described(path) for path in options.data], "prompts": commands.described(options.prompts),
        "settings": settings(options), "planned_steps": options.steps, "steps": options.steps,
        "stopped_after": stop, "problems": [], "seconds": {},
    }
    if convert(options, record):
        write(record, options.out)
        measure(options, record)
    write(record, options.out)
    for problem in record["problems"]:
        print(f"problem: {problem}", flush=True)
    return int(bool(record["problems"]))


if __name__ == "__main__":
    sys.exit(main())
