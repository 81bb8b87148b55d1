"""Kill conversions at random, resume them, compare with one that nobody touched: `python -m tools.crash --trials 100`.

A trial is `flarec convert` of a tiny model in a process of its own, which kills itself (SIGKILL) right before a random
event: an optimizer step, a call of the file system on the trial's files, or somewhere within the writing of a
weight file, which is cut short. What is left is resumed, killed again up to two times, and at last left alone. Then

* the weights, the tokenizer and the configurations are bit for bit those of the undisturbed run, and the log has the
  same lines but for times;
* the folder holds the checkpoint and nothing else: no lock, no temporary folder, no training state;
* no process ended in another way than by success or by its kill.

Half of the processes write their saves in the background. Trials take turns in what stands at OUT before: nothing, an
empty folder, an older checkpoint that is replaced in one step or in two. Everything follows from --seed. `--device
cuda` runs all of it on a GPU.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from flarec.checkpoint import place as placing
from flarec.checkpoint import write as writing
from flarec.cli import main as command
from flarec.train import saves
from flarec.train.loop import Trainer
from flarec.train.metrics import read_metrics
from tests.checkpoints import own_folder
from tests.cli.conversions import QUICK, write_data
from tests.models import few_checkpoint

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "write", "open", "chmod")
BEFORE = ("nothing", "empty", "checkpoint", "checkpoint, no exchange")
SAME = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TIMES = ("seconds", "tokens_per_second")
KILLS = 3
GIVEN: list[str] = []
"""Further arguments of every conversion."""


class Events:
    """Counts events below a folder, and kills the process right before number `kill_at`."""

    def __init__(self, folder: Path, kill_at: int | None, chance: random.Random) -> None:
        self.folder, self.kill_at, self.chance, self.count = str(folder), kill_at, chance, 0
        self.lock = threading.Lock()
        for name in CALLS:
            setattr(os, name, self.counted(getattr(os, name), lambda args: self.ours(args)))
        vars(placing)["exchange"] = self.counted(vars(placing)["exchange"], lambda args: True)
        Trainer.advance = self.counted(Trainer.advance, lambda args: True)  # type: ignore[method-assign]
        for module in (saves, writing):
            vars(module)["save_file"] = self.cut_short(vars(module)["save_file"])

    def ours(self, args: tuple[Any, ...]) -> bool:
        if not args or isinstance(args[0], int):
            return bool(args) and args[0] > 2  # a file that was opened
        return str(Path(os.fsdecode(args[0])).absolute()).startswith(self.folder)

    def counted(self, call: Callable[..., Any], ours: Callable[[tuple[Any, ...]], bool]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            if ours(args):
                self.happens()
            return call(*args, **options)

        return counting

    def cut_short(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def saving(tensors: Any, path: Path, *args: Any, **options: Any) -> None:
            dies = self.kill_at == self.count
            self.count += 1
            save(tensors, path, *args, **options)
            if dies:
                os.truncate(path, self.chance.randrange(os.path.getsize(path)))
                os.kill(os.getpid(), signal.SIGKILL)

        return saving

    def happens(self) -> None:
        with self.lock:
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def convert(place: Path, out: str, *more: str, kill_at: int | None = None, seed: int = 0, exchange: bool = True) -> int:
    """Run the command in a child; its exit code (negative: the signal). Writes `place`/events and `place`/log."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70
    try:
        os.chdir(place)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if not exchange:
            vars(placing)["exchange"] = lambda one, other: False
        events = Events(place / out, kill_at, random.Random(seed))
        if seed % 2:  # written by a thread; when a save is written is no part of a run
            more = (*more, "--set", "save.background=on")
        words = ["convert", "../source", "--data", "../data.jsonl", "--out", out, *QUICK, "--steps", "5", *GIVEN, *more]
        try:
            ended = command.main(words, standalone_mode=False)  # an error's exit code is returned here
            code = ended if isinstance(ended, int) else 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        Path("events").write_text(str(events.count))
    finally:
        sys.stdout.flush()
        os._exit(code)


def prepare(place: Path, before: str) -> None:
    place.mkdir()
    if before == "empty":
        (place / "out").mkdir()
    elif before != "nothing":
        own_folder(place / "out", "precious", "model.safetensors", "sub/deep")


def log_of(folder: Path) -> list[dict[str, Any]]:
    def timeless(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: timeless(value) if isinstance(value, dict) else value
            for key, value in values.items()
            if key not in TIMES
        }

    return [timeless(line) for line in read_metrics(folder / "metrics.jsonl")]


def differences(place: Path, whole: Path) -> list[str]:
    """What a trial's end has that it should not have, or lacks."""
    found = [name for name in SAME if (place / "out" / name).read_bytes() != (whole / name).read_bytes()]
    if log_of(place / "out") != log_of(whole):
        found.append("metrics.jsonl")
    expected = {path.relative_to(whole).as_posix() for path in whole.rglob("*")}
    found += sorted({path.relative_to(place / "out").as_posix() for path in (place / "out").rglob("*")} ^ expected)
    return found + sorted({path.name for path in place.iterdir()} - {"out", "log", "events"})


def trial(place: Path, number: int, seed: int, events: dict[str, int], whole: Path) -> tuple[list[int], list[str]]:
    """(where it was killed, what is wrong)"""
    before = BEFORE[number % len(BEFORE)]
    chance = random.Random(f"{seed} {number}")
    prepare(place, before)
    overwrite = ["--overwrite"] if before.startswith("checkpoint") else []
    kills: list[int] = []
    for attempt in range(KILLS + 1):
        last = attempt > 0 and (attempt == KILLS or chance.random() < 0.5)
        kill_at = None if last else chance.randrange(events[before])
        begun = (place / "out.partial" / "run.json").exists() or (attempt and (place / "out" / "flarec.json").exists()
                and not (place / "out" / "precious").exists())
        resume = ["--resume"] if begun else []
        code = convert(place, "out", *overwrite, *resume, kill_at=kill_at, seed=chance.randrange(1 << 30),
                       exchange="no exchange" not in before)
        if code == 0:
            return kills, differences(place, whole)
        if code != -signal.SIGKILL:
            return kills, [f"exit code {code}: {(place / 'log').read_text().strip()[-400:]}"]
        assert kill_at is not None
        kills.append(kill_at)
    raise AssertionError("the last attempt is not killed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every conversion")
    options = parser.parse_args()
    # a process that compiles takes long, and each is a new one
    compiled = ["train.compile=off"] if options.device == "cuda" else []
    GIVEN[:] = ["--device", options.device, *(word for key in [*compiled, *options.set] for word in ("--set", key))]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="flarec-crash-") as folder:
        top = Path(folder).resolve()
        os.environ["FLAREC_CACHE_DIR"] = str(top / "cache")
        write_data(top / "data.jsonl")
        few_checkpoint(top, "qwen3_5_text").rename(top / "source")
        events = {}
        for before in BEFORE:
            undisturbed = top / f"undisturbed {before}"
            prepare(undisturbed, before)
            more = ["--overwrite"] if before.startswith("checkpoint") else []
            code = convert(undisturbed, "out", *more, exchange="no exchange" not in before)
            assert code == 0, (undisturbed / "log").read_text()
            events[before] = int((undisturbed / "events").read_text())
            assert not differences(undisturbed, top / f"undisturbed {BEFORE[0]}" / "out"), before
        whole = top / f"undisturbed {BEFORE[0]}" / "out"
        print(f"events of an undisturbed run: {events}", flush=True)
        failed = kills = 0
        for number in range(options.trials):
            where, wrong = trial(top / f"trial-{number}", number, options.seed, events, whole)
            kills += len(where)
            failed += bool(wrong)
            if wrong:
                print(f"trial {number} ({BEFORE[number % len(BEFORE)]}, killed at {where}): {wrong}", flush=True)
            shutil.rmtree(top / f"trial-{number}")
    print(f"{options.trials - failed} of {options.trials} trials, {kills} kills: the same bits, nothing left over")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
