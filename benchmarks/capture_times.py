"""Time the capture of every family's smallest model, and of Qwen3.5 shapes on the meta device.

    python benchmarks/capture_times.py [--out results.json] [--repeats 3] [--threads 2]
    python benchmarks/capture_times.py --against CHECKOUT [--shape "qwen3_5 9B"] [--repeats 3] [--out results.json]

The targets are 3 s for a small model and 15 s for the 9B shape, wall time, without the program cache. The first
export of a process imports much; it is timed apart (`first`). The fastest of the repeats is reported, and all are kept.

With `--against` one shape is captured and lowered by this source tree and by another one, in turns and in processes of
their own, so that a busy machine disturbs both alike: ratios (this tree over the other) of processor seconds and peak
memory, each from the best of its repeats.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["FLAREC_CACHE_DIR"] = "off"

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from flarec.passes import lower

ROOT = Path(__file__).resolve().parent.parent
TARGET_SMALL, TARGET_9B = 3.0, 15.0
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_5 2B": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 8,
        "num_key_value_heads": 2, "linear_num_value_heads": 16, "tie_word_embeddings": True,
    },
    "qwen3_5 9B": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 16,
        "num_key_value_heads": 4, "linear_num_value_heads": 32, "tie_word_embeddings": False,
    },
}
CAPTURED_IN = ("flarec.frontend.export", "flarec.frontend")
"""Where `capture` is, in this tree and in older ones."""


def on_meta(name: str) -> Any:
    config = Qwen3_5TextConfig(
        head_dim=256, linear_num_key_heads=16, linear_key_head_dim=128, linear_value_head_dim=128, vocab_size=248320,
        **SHAPES[name],
    )
    with torch.device("meta"):
        return Qwen3_5ForCausalLM._from_config(config, dtype=torch.bfloat16)


def find_capture() -> Callable[[Any], Any]:
    for name in CAPTURED_IN:
        try:
            found: Callable[[Any], Any] = importlib.import_module(name).capture
        except (ModuleNotFoundError, AttributeError):
            continue
        return found
    sys.exit(f"this flarec has no capture in {' or '.join(CAPTURED_IN)}")


capture = find_capture()


def timed(model: Any) -> float:
    start = time.perf_counter()
    capture(model)
    return time.perf_counter() - start


def commit(tree: Path = ROOT) -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True)
    return done.stdout.strip()


def every_family(repeats: int) -> dict[str, Any]:
    from flarec.frontend.families import FAMILIES, PLAIN
    from flarec.frontend.tiny import available, build_tiny

    first = timed(build_tiny("qwen3_5_text"))
    print(f"first capture of the process: {first:.1f} s")
    seconds: dict[str, list[float]] = {}
    for name in (*(name for name in (*FAMILIES, *PLAIN) if available(name)), *SHAPES):
        model = on_meta(name) if name in SHAPES else build_tiny(name)
        seconds[name] = times = [timed(model) for _ in range(1 if name in SHAPES else repeats)]
        target = {"qwen3_5 9B": TARGET_9B, "qwen3_5 2B": None}.get(name, TARGET_SMALL)
        verdict = "" if target is None else "  met" if min(times) <= target else f"  MISSED ({target:.0f} s)"
        print(f"{name:<20} {min(times):6.2f} s{verdict}", flush=True)
    return {"commit": commit(), "first": first, "seconds": seconds}


def installed(tree: Path, place: Path) -> Path:
    """A folder of links in which the packages of a checkout lie as they are imported."""
    folders: dict[str, str] = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for package, folder in sorted(folders.items()):  # a package comes before what lies in it
        target = place.joinpath(*package.split("."))
        if "." in package:
            target.symlink_to(tree / folder)
            continue
        target.mkdir(parents=True)
        for entry in (tree / folder).iterdir():
            (target / entry.name).symlink_to(entry)
    return place


def peak() -> int:
    """Bytes of the largest resident size of this process so far (Linux counts KiB)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def one_shape(shape: str) -> dict[str, float]:
    """Capture and lower with the flarec that is on the path: processor seconds, and how far the peak of memory rose."""
    small = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64,
    )
    for kind in ("train", "decode"):  # the first of a process imports much
        lower(capture(LlamaForCausalLM(small)), kind)
    model, before = on_meta(shape), peak()
    times = [time.process_time()]
    program = capture(model)
    times.append(time.process_time())
    for kind in ("train", "decode"):
        lower(program, kind)
        times.append(time.process_time())
    names = ("capture seconds", "lower train seconds", "lower decode seconds")
    seconds = {name: end - start for name, start, end in zip(names, times, times[1:], strict=False)}
    return {**seconds, "peak bytes": peak() - before, "nodes": len(program.graph.nodes)}


def one_run(path: Path, shape: str) -> dict[str, float]:
    """`one_shape` with the packages of a tree, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", "--shape", shape], stdout=subprocess.PIPE, text=True,
        check=True, env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
    )
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def two_trees(other: Path, shape: str, repeats: int) -> dict[str, Any]:
    trees = {"here": ROOT, "against": other.resolve()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as place:
        paths = {name: installed(tree, Path(place, name)) for name, tree in trees.items()}
        for turn in range(repeats):
            for name in list(trees)[:: -1 if turn % 2 else 1]:
                runs[name].append(one_run(paths[name], shape))
                print(f"{name:<8} {runs[name][-1]}", flush=True)
    best = {name: {key: min(run[key] for run in found) for key in found[0]} for name, found in runs.items()}
    ratios = {key: value / best["against"][key] for key, value in best["here"].items()}
    for key, ratio in ratios.items():
        print(f"{key:<22} {best['here'][key]:14.6g} / {best['against'][key]:14.6g} = {ratio:.3f}")
    commits = {name: commit(tree) for name, tree in trees.items()}
    return {"commits": commits, "shape": shape, "runs": runs, "best": best, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time capture: of every family, or of two source trees in turns.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this repository")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3_5 9B", help="what --against captures")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a process of --against
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_shape(options.shape)))
        return
    torch.set_num_threads(options.threads)
    command = f"python benchmarks/capture_times.py --repeats {options.repeats}"
    if options.against is None:
        device = f"CPU, {options.threads} threads"
        command += f" --threads {options.threads}"
        results = every_family(options.repeats)
    else:
        device = "CPU, 1 thread"
        command += f' --against CHECKOUT --shape "{options.shape}"'
        results = two_trees(options.against, options.shape, options.repeats)
    versions = {
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
    }
    results = {"device": device, "versions": versions, "command": command, **results}
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
