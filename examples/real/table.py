"""What each recipe keeps of a real model and what it gains, beside the source: one conversion of each, one table.

    python examples/real/tasks.py --out out/tasks
    python examples/real/table.py SOURCE --data a0.jsonl --data a1.jsonl --tasks out/tasks \
        --prompts out/prompts/report.jsonl --out table.json [--steps 100 --workers 9 --time-limit 380 --commit ID]

Each row of `ROWS` is a `flarec convert` on the source's own answers, several learning rates where the model itself is
trained; of these `choose` decides, and the chosen one alone is reported: of the rates that keep `KEPT` of the source's
accuracy on the tasks that choose, the one with most tokens per forward on held-out documents of the training data (the
run's own probe), or the most accurate one if none does. `keeps.py` measures the source and the checkpoints:

* accuracy in causal mode on the tasks of `report` (kinds of which the source answers 30 % on `choose`), paired with the
  source: McNemar's test, the interval of the difference, and of the ratio (bootstrap over tasks);
* perplexity of texts of packages that nothing else was made of, and its ratio to the source's (bootstrap over texts);
* tokens per forward of AR-Trust at T = 0 and 1, loop-free answers apart;
* Diffusion-Trust, or elastic decoding with a horizon head (`flarec train-head`), on tasks whose answer is a record: the
  threshold is chosen on `choose`, the row is that of `report`.

Processes share the device: no time here is a speed. The file is written whenever something is done, and a later call
with the same --work and --out goes on with what is missing. When time runs out, what is dropped first is the last part
of every row (elastic, denoise, drafts, texts), then rows from the end of `ROWS`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import commands
from beside import compared, mean, print_table

COMMON = ("diffusion.block_size=5", "optimizer.warmup_steps=10", "optimizer.schedule=linear")
"""Of every row, unless it says otherwise."""
FLOOR = 0.3
"""Of the source's accuracy on a kind of tasks: below it a kind does not count."""
KEPT = 0.99
"""Of the source's accuracy on `choose`: learning rates that keep less are taken only if all do."""


@dataclass(frozen=True)
class Row:
    """A conversion. rates: learning rates of which `choose` takes one; head: a horizon head is trained after it."""

    recipe: str
    rates: tuple[str, ...]
    settings: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    head: bool = False


ROWS = {
    "draft": Row("draft", ("1e-4", "3e-5"), ("diffusion.grids=3",), ("denoise",)),
    "flare": Row("flare", ("1e-4", "3e-5"), (), ("denoise",)),
    "adapter": Row("adapter", ("3e-3",), ("diffusion.grids=3",)),
    "fluid": Row("fluid", ("3e-3",), ("diffusion.block_size=6",), ("elastic",), head=True),
    "dual": Row("dual", ("1e-4", "3e-5"), (), ("denoise",)),
    "adapter-dual": Row("adapter-dual", ("3e-3",), ("diffusion.grids=3",), ("denoise",)),
}
"""In the order in which they are begun."""


class Work:
    """Runs commands, at most so many at a time, until the time is over; raises `Failed` with what went wrong."""

    def __init__(self, options: argparse.Namespace, record: dict[str, Any]) -> None:
        self.options, self.record = options, record
        self.places = threading.Semaphore(options.workers)
        self.lock = threading.Lock()
        self.until = time.monotonic() + options.time_limit

    def run(self, name: str, command: Callable[[float], list[str]]) -> commands.Ran:
        """`command` is given the seconds that are left when its turn comes."""
        with self.places:
            left = self.until - time.monotonic()
            if left < 1:
                raise Failed(f"{name}: no time left")
            ran = commands.run(command(left), left)
        print(f"{name}: {ran.error or 'done'} in {ran.seconds:.0f} s", flush=True)
        if ran.error:
            raise Failed(f"{name}: {ran.error}")
        return ran

    def keep(self, key: str, name: str, value: Any) -> None:
        with self.lock:
            self.record[key][name] = value
            self.options.out.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")


class Failed(Exception):
    """A part that did not end well."""


def conversion(options: argparse.Namespace, row: Row, rate: str, out: Path) -> list[str]:
    settings = dict(setting.split("=", 1) for setting in (
        *COMMON, f"optimizer.batch_rows={options.rows}", f"optimizer.micro_rows={options.micro}",
        f"data.max_length={options.max_length}", f"evaluation.every={options.steps}", "evaluation.prompts=16",
        "train.memory=keep", "train.compile=off", *row.settings, f"optimizer.lr={rate}", *options.set,
    ))
    return commands.flarec(
        "convert", options.source, "--recipe", row.recipe, "--out", out, "--overwrite", "--steps", options.steps,
        "--seed", options.seed, "--device", options.device, *_each("--data", options.data),
        *_each("--set", [f"{key}={value}" for key, value in settings.items()]),
    )


def head(options: argparse.Namespace, checkpoint: Path, out: Path) -> list[str]:
    return commands.flarec(
        "train-head", checkpoint, *_each("--data", options.data), "--out", out, "--rows", options.head_rows, "--steps",
        options.head_steps, "--device", options.device, "--seed", options.seed, "--overwrite",
    )


def measurement(options: argparse.Namespace, model: Path, out: Path, parts: Sequence[str], left: float) -> list[str]:
    return commands.script(
        "keeps.py", model, "--tasks", options.tasks, "--prompts", options.prompts, "--out", out,
        *_each("--parts", parts), "--limit", options.limit, "--max-new-tokens", options.max_new_tokens, "--batch",
        options.batch, "--texts", options.texts, "--device", options.device,
        "--time-limit", f"{max(0.0, left - options.last_part):.0f}", *([] if options.chat else ["--no-chat"]),
        *(["--task-limit", options.task_limit] if options.task_limit else []),
    )


def _each(option: str, values: Sequence[object]) -> list[object]:
    return [part for value in values for part in (option, value)]


def converted(work: Work, name: str, row: Row, rate: str) -> Path:
    """The checkpoint, from an earlier call if that ran the same command."""
    folder = work.options.work / f"{name}@{rate}"
    command, noted = conversion(work.options, row, rate, folder / "checkpoint"), folder / "command.json"
    if (folder / "checkpoint" / "flarec.json").exists() and json.loads(noted.read_text()) == command:
        return folder / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work.run(f"{name} at {rate}", lambda _: command)
    noted.write_text(json.dumps(command))
    return folder / "checkpoint"


def probed(checkpoint: Path) -> float:
    """Tokens per forward on held-out documents at the end of the run."""
    held_out = json.loads((checkpoint / "flarec.json").read_text())["metrics"]["held_out"]
    return float(list(held_out.values())[-1]["tokens_per_forward"])


def keeping(work: Work, name: str, model: Path, out: Path, parts: Sequence[str]) -> dict[str, Any]:
    """What `keeps.py` wrote, whole or not: a part that is missing has an error of its own."""
    there: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if not any("error" in there.get(part, {"error": ""}) for part in parts):
        return there
    try:
        work.run(name, lambda left: measurement(work.options, model, out, parts, left))
    except Failed:
        if not out.exists():
            raise
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def chosen_rate(tried: dict[str, dict[str, float]], source: float) -> str:
    """rate -> {"accuracy", "tokens_per_forward"} on what chooses."""
    good = [rate for rate, row in tried.items() if row["accuracy"] >= KEPT * source]
    if good:
        return max(good, key=lambda rate: tried[rate]["tokens_per_forward"])
    return max(tried, key=lambda rate: tried[rate]["accuracy"])


def row_named(name: str, options: argparse.Namespace) -> Row:
    """With the learning rates of `--rate NAME=RATE`, if there are any."""
    given = tuple(rate for key, _, rate in (text.partition("=") for text in options.rate) if key == name)
    return replace(ROWS[name], rates=given or ROWS[name].rates)


def row_of(work: Work, name: str, base: Callable[[], dict[str, Any]]) -> None:
    """One row of the table, into the record."""
    row, found = row_named(name, work.options), dict[str, Any]()
    try:
        with ThreadPoolExecutor(len(row.rates)) as pool:
            checkpoints = dict(zip(row.rates, pool.map(lambda rate: _tried(work, name, row, rate), row.rates),
                                   strict=True))
        good = {rate: checkpoint for rate, checkpoint in checkpoints.items() if isinstance(checkpoint, Path)}
        found["failed"] = {rate: why for rate, why in checkpoints.items() if not isinstance(why, Path)}
        if not good:
            raise Failed("; ".join(found["failed"].values()))
        rate, found["tried"] = _choose(work, name, good, base)
        model = good[rate]
        found |= {"rate": rate, "command": commands.shown(conversion(work.options, row, rate, model)),
                  "probe": probed(model)}
        parts = ("report", "texts", "drafts", *row.parts)
        if row.head:
            model, found["head"] = _with_head(work, name, model)
            parts = parts if "error" not in found["head"] else ("report", "texts", "drafts")
        kept = keeping(work, f"{name}: measured", model, model.parent / "keeps.json", parts)
        found |= compared(kept, base())
    except Exception as error:  # a row that fails leaves the others
        found["error"] = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"[:400]
        print(f"{name}: {found['error']}", flush=True)
    work.keep("rows", name, found)


def _with_head(work: Work, name: str, checkpoint: Path) -> tuple[Path, dict[str, str]]:
    """The checkpoint with a horizon head, or without one where none could be trained."""
    out = checkpoint.with_name("with-head")
    command = head(work.options, checkpoint, out)
    try:
        if not (out / "flarec.json").exists():
            work.run(f"{name}: head", lambda _: command)
    except Failed as error:
        return checkpoint, {"command": commands.shown(command), "error": str(error)}
    return out, {"command": commands.shown(command)}


def _tried(work: Work, name: str, row: Row, rate: str) -> Path | str:
    try:
        return converted(work, name, row, rate)
    except Failed as error:
        return str(error)


def _choose(
    work: Work, name: str, checkpoints: dict[str, Path], base: Callable[[], dict[str, Any]]
) -> tuple[str, dict[str, dict[str, float]]]:
    """The rate, and what was seen of each where there is a choice."""
    if len(checkpoints) == 1:
        return next(iter(checkpoints)), {}
    source = base()
    counted = source["counted"]

    def seen(item: tuple[str, Path]) -> dict[str, float]:
        rate, checkpoint = item
        kept = keeping(work, f"{name} at {rate}: choose", checkpoint, checkpoint.parent / "keeps.json", ["choose"])
        _sound(kept, "choose")
        return {"accuracy": mean(kept["choose"]["right"], counted["choose"]), "tokens_per_forward": probed(checkpoint)}

    with ThreadPoolExecutor(len(checkpoints)) as pool:
        tried = dict(zip(checkpoints, pool.map(seen, checkpoints.items()), strict=True))
    return chosen_rate(tried, mean(source["choose"]["right"], counted["choose"])), tried


def _sound(kept: dict[str, Any], part: str) -> None:
    if "error" in kept.get(part, {"error": "not measured"}):
        raise Failed(f"{part}: {kept.get(part, {}).get('error', 'not measured')}")


def source_of(work: Work) -> dict[str, Any]:
    """The source's own answers, and the places of the tasks that count."""
    out = work.options.work / "source-keeps.json"
    kept = keeping(work, "source", work.options.source, out, ("choose", "report", "texts"))
    for part in ("choose", "report"):
        _sound(kept, part)
    tasks = {split: _tasks(work.options, split) for split in ("choose", "report")}
    kinds = sorted({task["kind"] for task in tasks["choose"]})
    reached = {kind: mean(kept["choose"]["right"], _places(tasks["choose"], kind)) for kind in kinds}
    counting = {kind for kind in kinds if reached[kind] >= FLOOR}
    if not counting:
        raise Failed(f"the source reaches {FLOOR:.0%} on no kind of tasks: {reached}")
    counted = {split: [place for place, task in enumerate(tasks[split]) if task["kind"] in counting]
               for split in tasks}
    # how a kind is known: of a task its group and its name
    named = {split: [(task["group"], task["kind"]) for task in tasks[split]] for split in tasks}
    return {**kept, "counted": counted, "named": named, "by_kind_choose": reached}


def _tasks(options: argparse.Namespace, split: str) -> list[dict[str, Any]]:
    lines = (options.tasks / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][: options.task_limit]


def _places(tasks: Sequence[dict[str, Any]], kind: str) -> list[int]:
    return [place for place, task in enumerate(tasks) if task["kind"] == kind]


def fill(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """All rows that are not there or failed, at the same time."""
    work = Work(options, record)
    names = options.only or list(ROWS)
    waiting = [name for name in names if not whole(record["rows"].get(name))]
    with ThreadPoolExecutor(len(waiting) + 1) as pool:
        base = pool.submit(source_of, work)
        for done in [pool.submit(row_of, work, name, base.result) for name in waiting]:
            done.result()
        found = base.result()
    source = {part: {"accuracy": mean(found[part]["right"], found["counted"][part]),
                     "tasks": len(found["counted"][part])} for part in ("choose", "report")}
    work.keep("measured", "source", {**source, "by_kind_choose": found["by_kind_choose"]})


def whole(row: dict[str, Any] | None) -> bool:
    """Whether nothing of a row is missing."""
    return row is not None and "error" not in row and not any(
        isinstance(part, dict) and "error" in part for part in row.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--data", type=Path, action="append", required=True, help="answers to learn from (repeatable)")
    parser.add_argument("--tasks", type=Path, required=True, help="directory that tasks.py wrote")
    parser.add_argument("--prompts", type=Path, required=True, help="of other packages, to measure on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("out/table"))
    parser.add_argument("--only", action="append", choices=ROWS, default=[])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16, help="packed rows of a step")
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every recipe (repeatable)")
    parser.add_argument("--rate", action="append", default=[], metavar="ROW=RATE",
                        help="learning rates of a row, instead of those in ROWS (repeatable)")
    parser.add_argument("--head-rows", type=int, default=64, help="packed rows that a horizon head learns from")
    parser.add_argument("--head-steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=128, help="prompts whose drafts are counted")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--task-limit", type=int, help="use only the first tasks")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workers", type=int, default=9, help="processes at the same time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time-limit", type=float, default=380.0, help="seconds")
    parser.add_argument("--last-part", type=float, default=25.0, help="seconds before the end after which none begins")
    parser.add_argument("--commit", default="")
    options = parser.parse_args(arguments)
    for text in options.rate:
        if text.partition("=")[0] not in ROWS:
            parser.error(f"--rate {text}: give ROW=RATE with a row of {', '.join(ROWS)}")
    options.work.mkdir(parents=True, exist_ok=True)
    said = {
        "source": {"name": options.source.name,
                   "weights": [commands.described(path) for path in sorted(options.source.glob("*.safetensors"))]},
        "data": [commands.described(path) for path in options.data],
        "tasks": [commands.described(options.tasks / f"{split}.jsonl") for split in ("choose", "report")],
        "prompts": commands.described(options.prompts),
        "settings": {name: getattr(options, name) for name in (
            "steps", "rows", "micro", "max_length", "set", "rate", "head_rows", "head_steps", "seed", "limit",
            "max_new_tokens", "task_limit", "texts", "batch")},
        "commit": options.commit,
    }
    record: dict[str, Any] = {"measured": {}, "rows": {}}
    if options.out.exists():
        record = json.loads(options.out.read_text())
        if {key: record.get(key) for key in said} != said:
            parser.error(f"{options.out} was measured with other settings; give another --out")
    words = sys.argv[1:] if arguments is None else arguments
    record = {**commands.machine(), **said, "command": " ".join(["python examples/real/table.py", *map(str, words)]),
              "measured": record["measured"], "rows": record["rows"]}
    start = time.monotonic()
    try:
        fill(options, record)
    except Failed as failed:
        print(f"source: {failed}", flush=True)
    record["seconds"] = round(time.monotonic() - start, 1)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print_table(record["rows"])
    return int(not all(whole(record["rows"].get(name)) for name in options.only or ROWS))


if __name__ == "__main__":
    sys.exit(main())
