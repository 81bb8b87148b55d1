"""The ladder: what each ingredient of the method does, on a model of 30 M parameters that is trained here.

    python -m benchmarks.ladder data --out out/ladder/data                       # texts, tasks, tokenizer: some minutes
    python -m benchmarks.ladder run --data out/ladder/data --work WORK --out FILE.json --gpus 2 --workers 16
    python -m benchmarks.ladder report FILE.json ... --out benchmarks/results/ladder-h200.json --plot docs/ladder.png

`run` trains the source unless WORK has one, then converts it arm by arm (`arms.py`), several at a time, and measures
each; FILE.json holds what is done at every moment. It ends itself at the time limit. WORK, or `--done FILE.json ...`
with `--pieces`, lets another call go on; calls at the same time on one machine, each with a CUDA_VISIBLE_DEVICES of its
own, may share WORK: one of them trains the source, and all of them take arms. Two steps of the publication are no arms:
pure block diffusion, whose clean stream is not causal, and rows that predict their own token. A causal clean stream and
the shift are in the contract here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from benchmarks.ladder.arms import SEEDS, Arm, arms
from benchmarks.ladder.measure import Sizes

PIECE = 15 << 20
"""Bytes of a piece of the packed source model."""
SHOWN = ("AR loss change", "tokens per forward, T=0", "tokens per forward, T=1", "Diffusion-Trust, accuracy")
"""Differences that `report` prints."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data")
    data.add_argument("--out", type=Path, required=True)
    data.add_argument("--characters", type=int, default=24_000_000, help="of the split `train`")
    data.add_argument("--tasks", type=int, default=60_000, help="of the split `train`")
    report = commands.add_parser("report")
    report.add_argument("files", type=Path, nargs="+")
    report.add_argument("--out", type=Path, required=True)
    report.add_argument("--plot", type=Path)
    for name in ("run", "source", "worker"):
        _run_options(commands.add_parser(name))
    options = parser.parse_args(arguments)
    if options.command == "data":
        from benchmarks.ladder.data import build

        print(json.dumps(build(options.out, options.characters, options.tasks), indent=1))
    elif options.command == "report":
        _report(options)
    else:
        {"run": _run, "source": _source, "worker": _worker}[options.command](options)
    return 0


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of what is in the making")
    parser.add_argument("--out", type=Path, help="FILE.json")
    parser.add_argument("--shape", default="30M", choices=("30M", "toy"))
    parser.add_argument("--gpus", type=int, default=1, help="0 for the CPU")
    parser.add_argument("--workers", type=int, default=12, help="in all")
    parser.add_argument("--time-limit", type=float, default=480, help="seconds of the whole call")
    parser.add_argument("--source-steps", type=int, default=1000)
    parser.add_argument("--source-seconds", type=float, default=240, help="fewer steps if these take longer")
    parser.add_argument("--source-rows", type=int, default=32)
    parser.add_argument("--source-data", default="train", choices=("train", "arms"), help="arms: a sixth, read sooner")
    parser.add_argument("--steps", type=int, default=200, help="of every arm")
    parser.add_argument("--rows", type=int, default=16, help="of a step of an arm")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--arms", default="", help="names, separated by commas; default: all")
    parser.add_argument("--sizes", default="", help="JSON: fields of Sizes")
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="FILE.json of earlier calls, whose arms stay")
    parser.add_argument("--pieces", type=Path, help="folder: the source model from its pieces, or into them")
    parser.add_argument("--commit", help="of the tree, where git cannot tell")
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)


def _run(options: argparse.Namespace) -> None:
    from benchmarks.ladder.pool import claimed, result_of, run_pool

    start = time.time()
    options.until = options.until or start + options.time_limit
    work = options.work
    for name in ("arms", "claims", "checkpoints"):
        (work / name).mkdir(parents=True, exist_ok=True)
    for done in options.done:
        for result in json.loads(done.read_text())["results"]:
            result_of(work, Arm(result["arm"], "", (), result["seed"])).write_text(json.dumps(result))
    for path in (work / "arms").glob("*.json"):  # what failed is tried again
        if "error" in json.loads(path.read_text()):
            path.unlink()
    while not (work / "source.json").exists():
        if not claimed(work, "source"):
            if time.time() > options.until:
                raise SystemExit("another call trains the source and is not done; call again")
            time.sleep(1)
        elif options.pieces and any(options.pieces.glob("source.tar.*")):
            _unpack(options.pieces, work)
        else:
            print("training the source", flush=True)
            _call("source", options)
            if options.pieces:
                _pack(work, options.pieces)
    print(f"source: {json.loads((work / 'source.json').read_text())}", flush=True)
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = (visible or [str(number) for number in range(options.gpus)])[: options.gpus] or ["cpu"]
    seen: set[str] = set()

    def collect() -> None:
        results = [json.loads(path.read_text()) for path in sorted((work / "arms").glob("*.json"))]
        for result in results:
            key = f"{result['arm']} seed {result['seed']}"
            if key not in seen:
                seen.add(key)
                print(f"{time.time() - start:.0f} s: {key}: {result.get('error') or result['seconds']}", flush=True)
        _write(options, results, time.time() - start)

    run_pool(_words("worker", options), work, workers=options.workers, devices=devices, until=options.until - 5,
             collect=collect)
    print(f"{len(seen)} of {len(_arms(options))} arms are done after {time.time() - start:.0f} s", flush=True)
    for path in sorted(work.glob("worker-*.log"))[:1]:
        print(path.read_text(errors="replace")[-1500:])


def _source(options: argparse.Namespace) -> None:
    import flarec
    from benchmarks.ladder.measure import measured
    from benchmarks.ladder.source import train_source

    device = "cuda" if options.gpus else "cpu"
    made = train_source(
        options.data, options.work, shape=options.shape, steps=options.source_steps, rows=options.source_rows,
        length=options.length, device=device, seed=0, part=options.source_data, seconds=options.source_seconds,
    )
    model = flarec.load(options.work / "source", device=device, graphs="off", compile="off")
    found = measured(model, options.data, _sizes(options), ("causal",))
    part = options.work / "source.part"
    part.write_text(json.dumps({"training": made, **found}))
    part.replace(options.work / "source.json")


def _worker(options: argparse.Namespace) -> None:
    from benchmarks.ladder.pool import work_on

    work_on(
        _arms(options), options.work, options.data, options.work / "source", sizes=_sizes(options),
        settings={"steps": options.steps, "rows": options.rows, "length": options.length},
        device="cuda" if options.gpus else "cpu", until=options.until - 8,
    )


def _write(options: argparse.Namespace, results: list[dict[str, Any]], seconds: float) -> None:
    import torch
    import transformers

    if options.out is None:
        return
    cuda = options.gpus and torch.cuda.is_available()
    record = {
        "command": " ".join(["python -m benchmarks.ladder", *sys.argv[1:]]), "commit": options.commit or _commit(),
        "device": f"{options.gpus} x {torch.cuda.get_device_name()}" if cuda else f"{platform.machine()} CPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "settings": {name: getattr(options, name) for name in ("shape", "steps", "rows", "length", "workers")},
        "data": json.loads((options.data / "data.json").read_text()), "seconds": round(seconds, 1),
        "source": json.loads((options.work / "source.json").read_text()), "results": results,
    }
    part = options.out.with_suffix(".part")
    part.write_text(json.dumps(record) + "\n")
    part.replace(options.out)


def _report(options: argparse.Namespace) -> None:
    from benchmarks.ladder.picture import draw
    from benchmarks.ladder.summary import summarised

    records = [json.loads(path.read_text()) for path in options.files]
    for record in records[1:]:
        if record["source"] != records[0]["source"]:
            raise SystemExit("these results are of different source models; give those of one")
    found = [result for record in records for result in record.pop("results")]
    found.sort(key=lambda result: "error" not in result)  # what failed in one call and not in another has not failed
    results = {(result["arm"], result["seed"]): result for result in found}
    summary = summarised(list(results.values()), records[0]["source"])
    table = {"runs": records, "summary": summary, "results": [*results.values()]}
    options.out.write_text(json.dumps(table, indent=1) + "\n")
    if options.plot:
        draw(summary, options.plot)
    for step in summary["steps"]:
        for name in SHOWN:
            if value := step["difference"].get(name):
                shown = " to ".join(f"{bound:+.3f}" for bound in value["interval"] or ())
                print(f"{step['step']:<40} {name:<28} {value['mean']:+.3f}  {shown}")


def _arms(options: argparse.Namespace) -> list[Arm]:
    wanted = [name for name in options.arms.split(",") if name]
    return [arm for arm in arms(tuple(range(options.seeds))) if not wanted or arm.name in wanted]


def _sizes(options: argparse.Namespace) -> Sizes:
    return Sizes(**json.loads(options.sizes or "{}"))


def _call(name: str, options: argparse.Namespace) -> None:
    words = [sys.executable, "-m", "benchmarks.ladder", *_words(name, options)]
    try:
        subprocess.run(words, check=True, timeout=max(1.0, options.until - time.time()))
    except subprocess.SubprocessError as error:
        raise SystemExit(f"{name}: {str(error)[-300:]}") from None


def _words(name: str, options: argparse.Namespace) -> list[str]:
    """The command line of a part of the run."""
    words = [name]
    for key in (
        "data", "work", "shape", "gpus", "source_steps", "source_seconds", "source_rows", "source_data", "steps",
        "rows", "length", "seeds", "arms", "sizes", "until",
    ):
        words += [f"--{key.replace('_', '-')}={getattr(options, key)}"]
    return words


def _pack(work: Path, pieces: Path) -> None:
    """The source model and what is known of it as `source.tar.00`, ...: bfloat16 becomes a fifth smaller."""
    whole = work / "source.tar"
    with tarfile.open(whole, "w:gz", compresslevel=6) as archive:
        for name in ("source", "source.json"):
            archive.add(work / name, name)
    pieces.mkdir(parents=True, exist_ok=True)
    with whole.open("rb") as file:
        number = 0
        while piece := file.read(PIECE):
            (pieces / f"source.tar.{number:02}").write_bytes(piece)
            number += 1
    whole.unlink()


def _unpack(pieces: Path, work: Path) -> None:
    whole = work / "source.tar"
    whole.write_bytes(b"".join(path.read_bytes() for path in sorted(pieces.glob("source.tar.*"))))
    with tarfile.open(whole) as archive:
        archive.extractall(work / "unpacked", filter="data")
    for name in ("source", "source.json"):  # the latter says that all is there
        (work / "unpacked" / name).replace(work / name)
    whole.unlink()


def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
