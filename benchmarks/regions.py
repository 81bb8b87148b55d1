"""Compiled regions on a device: are they right, what do they cost to compile, and which kernels does a step run.

    python benchmarks/regions.py --out out/regions.json             # on a GPU: errors, then kernels of the 2B shape
    python benchmarks/regions.py --device cpu --parts errors        # without one

errors: losses, logits and gradients of a small Qwen3.5 in bfloat16 and float32, by eager and by compiled regions, each
against the same parameters in float64; a decode step likewise. A compiled error may be `FACTOR` times eager's.
sampling: kernels of the choice of 16 tokens from 248k logits, and its time as a graph.
prefill: kernels of one forward over a long prompt, as first prompts are read and as later ones are; ms in such pieces,
and what the host does where there are four: seconds until the last one is queued, and its functions by their own time.
decode, flare, draft: kernels of a step by total time, with and without compiled regions (--compile names one); of
decoding (on a GPU) for every number of --requests, beside the wall time of a step (modes in turns), the gaps between
its kernels and the time of a launch; of training what the host does: seconds until a step is queued, and its functions
by their own time.
Each part runs in a process of its own, and one that fails is recorded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("FLAREC_CACHE_DIR", "off")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from flarec.bench.training import part as training_part
from flarec.bench.training.profile import kernels_of, length, seconds_of, union, wait
from flarec.bench.training.shapes import PartPlan
from flarec.decode import Engine

FACTOR = 1.25
PARTS = ("errors", "sampling", "prefill", "decode", "flare", "draft")


def relative(found: Tensor, witness: Tensor) -> float:
    return float((found.double() - witness.double()).norm() / witness.double().norm().clamp_min(1e-30))


def errors(options: argparse.Namespace) -> dict[str, Any]:
    """Relative errors against float64, eager's and compiled."""
    from flarec.frontend.tiny import build_tiny

    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = build_tiny("qwen3_5_text", 0, hidden_size=256, intermediate_size=512).to(options.device, dtype).eval()
        for name, measure in (("train", train_errors), ("decode", decode_errors)):
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    found[f"{name} {dtype}"] = measure(model)
                found[f"{name} {dtype}"]["warnings"] = [str(item.message)[:300] for item in said]
            except Exception as error:  # a part that fails is a result too
                found[f"{name} {dtype}"] = {"error": f"{type(error).__name__}: {str(error)[:600]}"}
            print(name, dtype, json.dumps(found[f"{name} {dtype}"]), flush=True)
    return found


def programs(model: Any, target: str) -> tuple[Any, Any, Any]:
    """Eager, compiled, and the float64 witness with the same parameters."""
    import copy

    from flarec.frontend.export import capture
    from flarec.ir.compiled import compiled_by_region, step_codes
    from flarec.passes import lower

    kernels = "triton" if next(model.parameters()).is_cuda else "torch"
    captured = capture(model)
    eager = lower(captured, target, kernels=kernels)
    codes = step_codes() if target == "decode" else None
    fast = compiled_by_region(lower(captured, target, kernels=kernels, regions=True), codes)
    return eager, fast, lower(capture(copy.deepcopy(model).double()), target)


def train_errors(model: Any) -> dict[str, Any]:
    from flarec.layout import Block, build_layout

    layout = build_layout([[70, 40], [128]], [[Block(0, 20, 3), Block(1, 3, 3)], [Block(0, 40, 3), Block(0, 90, 3)]])
    generator = torch.Generator().manual_seed(0)
    results = []
    for program in programs(model, "train"):
        generator.manual_seed(0)
        shape = layout.rows, layout.length
        ids = torch.randint(0, program.vocab_size - 1, shape, generator=generator).to(program.device)
        parameters = program.parameters()
        start = time.perf_counter()
        logits = program(ids, layout=layout.to(program.device), head_rows=torch.arange(ids.numel()).to(program.device))
        loss = torch.nn.functional.cross_entropy(logits.float(), ids.roll(-1).flatten())
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        seconds = time.perf_counter() - start
        results.append((logits.detach(), dict(zip(parameters, gradients, strict=True)), seconds))
    exact, wanted, _ = results.pop()
    rows: dict[str, dict[str, Any]] = {}
    for name, (logits, found, seconds) in zip(("eager", "compiled"), results, strict=True):
        each = {
            key: relative(value, wanted[key]) for key, value in found.items()
            if value is not None and wanted[key] is not None and float(wanted[key].norm()) > 0
        }
        worst = max(each, key=each.__getitem__)
        mean = sum(each.values()) / len(each)
        rows[name] = {"logits": relative(logits, exact), "gradients": mean, "worst": [worst, each[worst]],
                      "seconds": seconds}
    between = relative(results[1][0], results[0][0])
    good = all(rows["compiled"][key] <= FACTOR * rows["eager"][key] for key in ("logits", "gradients"))
    return {**rows, "compiled to eager": between, "holds": good}


def decode_errors(model: Any) -> dict[str, Any]:
    from flarec.decode.cache import Cache
    from flarec.layout import Block, build_layout

    found = []
    for program in programs(model, "decode"):
        device, generator = program.device, torch.Generator().manual_seed(0)
        cache = Cache.allocate(program.cache_slots, 2, 64, device)

        def ids(layout: Any, generator: torch.Generator = generator, vocabulary: int = program.vocab_size) -> Tensor:
            return torch.randint(0, vocabulary - 1, (layout.rows, layout.length), generator=generator)

        first = build_layout([[24], [24]], [[], []], device=device)
        program.step(ids(first).to(device), first, torch.arange(48, device=device), cache)
        cache.accept(torch.tensor([24, 23], device=device))
        step = build_layout([[3], [3]], [[Block(0, 26, 3)], [Block(0, 24, 3)]], cached=[24, 23], device=device)
        found.append(program.step(ids(step).to(device), step, torch.arange(12, device=device), cache))
    eager, fast, witness = found
    rows = {"eager": {"logits": relative(eager, witness)}, "compiled": {"logits": relative(fast, witness)}}
    good = rows["compiled"]["logits"] <= FACTOR * rows["eager"]["logits"]
    return {**rows, "compiled to eager": relative(fast, eager), "holds": good}


def by_kernel(step: Callable[[], object], count: int) -> dict[str, Any]:
    """Kernels of a step: how many, their time in ms, and the largest by total time; what copies and sets memory without
    a kernel; and between which kernels the GPU has nothing to do for longest, in ms a step."""
    if not torch.cuda.is_available():
        return {"largest": []}
    kernels = kernels_of(step, count)
    totals: dict[str, list[int]] = defaultdict(list)
    for name, (first, last) in kernels:
        totals[name].append(last - first)
    largest = sorted(totals, key=lambda name: -sum(totals[name]))[:40]
    busy = length(union(span for _, span in kernels))
    kernels.sort(key=lambda kernel: kernel[1])
    gaps: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (before, (_, last)), (behind, (first, _)) in itertools.pairwise(kernels):
        gaps[before, behind].append(max(0, first - last))
    longest = sorted(gaps, key=lambda pair: -sum(gaps[pair]))[:20]
    return {
        "kernels": len(kernels) / count, "busy_ms": busy / count / 1e6,
        "memory": {name: len(totals[name]) / count for name in totals if name.startswith(("Memcpy", "Memset"))},
        "gaps": [[f"{pair[0][:60]} | {pair[1][:60]}", len(gaps[pair]) / count, sum(gaps[pair]) / count / 1e6]
                 for pair in longest],
        "largest": [[name[:100], len(totals[name]) / count, sum(totals[name]) / count / 1e6] for name in largest],
    }


def decode(options: argparse.Namespace) -> dict[str, Any]:
    from flarec.base.generation import GenerationOptions, Mode
    from flarec.bench.serving.models import ServingSession
    from flarec.bench.serving.ours import in_turns

    if not torch.cuda.is_available():
        raise SystemExit("steps of decoding are replayed on a GPU alone")
    found: dict[str, Any] = {}
    for compiled in (choice == "on" for choice in options.compile):
        session = ServingSession(torch.device(options.device), options.shape, compile=compiled)
        modes: tuple[Mode, ...] = ("causal", "ar-trust")
        for requests in options.requests:
            engines, ready = [], []
            for mode in modes:
                start, engine = time.perf_counter(), session.engine(requests)
                for prompt in session.prompts(requests):
                    engine.add(prompt, GenerationOptions(mode=mode, max_new_tokens=1 << 14))
                while engine.stats.replays < 8:
                    engine.step()
                session.wait()
                engines.append(engine)
                ready.append(time.perf_counter() - start)
            (walls,) = in_turns([engine.step for engine in engines], 200, 1)
            for mode, engine, seconds, wall in zip(modes, engines, ready, walls, strict=True):
                name = f"{mode} {'compiled' if compiled else 'eager'}"
                name += f", {requests} requests" if requests > 1 else ""
                row = {"seconds_to_replays": seconds, "wall_ms": wall} | by_kernel(engine.step, 4) | replayed_ms(engine)
                found[name] = row
                shown(name, row)
                options.result.write_text(json.dumps(found))  # what there is, if time runs out
    return found


def replayed_ms(engine: Engine) -> dict[str, float]:
    """Medians of one replay without the rest of a step: until the host has launched it, and until it is done. What the
    requests hold is wrong afterwards."""
    (lane,) = engine._serving.lanes.values()
    replay = getattr(lane.running, "_replay", None)
    if replay is None or not torch.cuda.is_available():
        return {}
    launched, done = [], []
    for _ in range(100):
        torch.cuda.synchronize()
        start = time.perf_counter()
        replay()
        launched.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        done.append(1e3 * (time.perf_counter() - start))
    return {"launch_ms": statistics.median(launched), "replay_ms": statistics.median(done)}


def prefill(options: argparse.Namespace) -> dict[str, Any]:
    from flarec.bench.serving.models import ServingSession
    from flarec.bench.serving.ours import prefill_ms, reading

    tokens = 8192 if options.shape == "2B" else 512
    session, found = ServingSession(torch.device(options.device), options.shape, compile=True), dict[str, Any]()
    for compiled in (choice == "on" for choice in options.compile[::-1]):
        start = time.perf_counter()
        reading(session, tokens, None, early=not compiled)()
        session.wait()
        first = time.perf_counter() - start
        pieces = {chunk: prefill_ms(session, tokens, chunk, early=not compiled) for chunk in (tokens, tokens // 4)}
        step = reading(session, tokens, None, early=not compiled)
        kernels = by_kernel(step, 1)

        def in_pieces(early: bool = not compiled) -> None:
            reading(session, tokens, tokens // 4, early=early)()

        row = {"first_seconds": first, "ms_by_piece": pieces, **host_of(in_pieces), **kernels}
        found["compiled" if compiled else "first prompts"] = row
        shown("prefill, compiled" if compiled else "prefill, first prompts", row)
        options.result.write_text(json.dumps(found))
    return found


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    from flarec.bench.serving.models import ServingSession
    from flarec.bench.serving.ours import sampler, sampling_ms

    session = ServingSession(torch.device(options.device), options.shape)
    found = {"graph_ms": sampling_ms(session, 16), **by_kernel(sampler(session, 16), 4)}
    shown("sampling", found)
    return found


def observing(rows: list[dict[str, Any]]) -> Callable[[Callable[[], object], PartPlan], dict[str, Any]]:
    """What measures a step in the place of that of `flarec bench train`, and notes it in `rows`."""

    def measured(step: Callable[[], object], plan: PartPlan) -> dict[str, Any]:
        start = time.perf_counter()
        seconds_of(step, 1)
        first = time.perf_counter() - start
        seconds_of(step, 2)
        seconds = seconds_of(step, 3)
        rows.append({"first_step_seconds": first, "seconds": seconds, **host_of(step), **by_kernel(step, 1)})
        return rows[-1]

    return measured


def training(options: argparse.Namespace, part: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for compiled in options.compile:
        tokens = 2048 if options.shape == "2B" else 64
        given = PartPlan(part, options.shape, options.device, 4, tokens, (4,), compile=compiled, quick=True)
        rows: list[dict[str, Any]] = []
        with mock.patch.object(training_part, "measured", observing(rows)):
            training_part.ours([given], lambda part, result: None)
        found[f"{part} compile={compiled}"] = rows[-1]
        shown(f"{part} compile={compiled}", rows[-1])
    return found


def host_of(step: Callable[[], object]) -> dict[str, Any]:
    """Seconds until a step is queued, the device not waited for, and the host's functions in it by own milliseconds."""
    import cProfile
    import pstats

    wait()
    start = time.perf_counter()
    step()
    queued = time.perf_counter() - start
    wait()
    profiler = cProfile.Profile()
    profiler.runcall(step)
    wait()
    stats: Any = pstats.Stats(profiler)
    own = [(1e3 * row[2], row[0], f"{Path(at[0]).name}:{at[1]} {at[2]}") for at, row in stats.stats.items()]
    return {"queued_seconds": queued, "host": sorted(own)[:-25:-1]}


def shown(name: str, row: dict[str, Any]) -> None:
    listed = ("largest", "host", "gaps")
    print(f"== {name}: " + ", ".join(f"{key} {value}" for key, value in row.items() if key not in listed), flush=True)
    for pair, count, ms in row.get("gaps", ())[:12]:
        print(f"   idle {ms:8.4f} ms {count:6.1f} x {pair}", flush=True)
    for ms, count, function in row.get("host", ()):
        print(f"   host {ms:8.2f} ms {count:6} x {function}", flush=True)
    for kernel, count, ms in row["largest"][:24]:
        print(f"   {ms:8.3f} ms {count:7.1f} x {kernel}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default="2B")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--compile", nargs="*", choices=("on", "off"), default=("on", "off"))
    parser.add_argument("--requests", nargs="*", type=int, default=[1])
    parser.add_argument("--time-limit", type=float, default=400.0)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        known = {"errors": errors, "decode": decode, "sampling": sampling, "prefill": prefill}
        result = known[options.part](options) if options.part in known else training(options, options.part)
        options.result.write_text(json.dumps(result))
        return 0
    begin, results = time.monotonic(), dict[str, Any]()
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            command = [sys.executable, __file__, "--part", part, "--result", str(path), "--device", options.device,
                       "--shape", options.shape, "--compile", *options.compile,
                       "--requests", *map(str, options.requests)]
            try:
                done = subprocess.run(command, stderr=subprocess.PIPE, text=True,
                                      timeout=max(1.0, options.time_limit - (time.monotonic() - begin)))
                failed = done.stderr[-1500:] if done.returncode else ""
            except subprocess.TimeoutExpired:
                failed = "no time left"
            results[part] = json.loads(path.read_text()) if path.is_file() else {"error": failed}
            if failed and "error" not in results[part]:
                results[part]["ended"] = failed
            print(f"{time.monotonic() - begin:.0f} s: {part}: {failed or 'measured'}", flush=True)
    if options.out:
        record = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": " ".join(["python benchmarks/regions.py", *sys.argv[1:]]), "commit": options.commit,
            "shape": options.shape, "factor": FACTOR, "parts": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(any("error" in part for part in results.values()))


if __name__ == "__main__":
    sys.exit(main())
