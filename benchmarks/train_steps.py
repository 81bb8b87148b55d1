"""Optimizer steps of the Qwen3.5 2B shape on a GPU, in bfloat16: stock fine-tuning, and flarec's recipes beside it.

    python benchmarks/train_steps.py --out benchmarks/results/train-steps.json --commit $(git rev-parse HEAD)
    python benchmarks/train_steps.py --quick

8 rows of 2048 clean tokens, every token but the first a target; AdamW, clip 1. "stock" is autoregressive fine-tuning of
the transformers model as it is, eager, with the kernels of flash-linear-attention if it can be imported (--library DIR
names a folder with it), bfloat16 weights and moments; its best micro batch counts. Ours have float32 masters and
moments: the clean stream alone ("ar"), "flare", "draft", and "adapter" (the objective of "draft" over a frozen model,
rank 64); with "-recompute" decoder layers are computed again in the backward pass (`train.memory`), also in "flare-4B"
and "adapter-9B" of larger shapes. Every part runs in a process of its own; kernels are compiled before, in
parallel. Of a part's micro batches the fastest counts that stays below the bar on memory, if one does. MFU counts the
head only for rows that need logits, no attention, and nothing that is computed again. `predicted_gib` is what
`train.memory = auto` expects of a step without compiled regions.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("FLAREC_CACHE_DIR", "off")

import torch

ROWS, LENGTH, VOCABULARY = 8, 2048, 248320
LINEAR = {"head_dim": 256, "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
          "linear_num_value_heads": 16, "num_attention_heads": 8, "num_key_value_heads": 2}
LARGE = {**LINEAR, "linear_num_value_heads": 32, "num_attention_heads": 16, "num_key_value_heads": 4}
SHAPES: dict[str, dict[str, int]] = {
    "2B": {**LINEAR, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "vocab_size": VOCABULARY},
    "4B": {**LARGE, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "vocab_size": VOCABULARY},
    "9B": {**LARGE, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "vocab_size": VOCABULARY,
           "tie_word_embeddings": False},
    # the same mixers with little around them: compiles the same kernels
    "warm": {**LINEAR, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 2048},
    "warm-large": {**LARGE, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 2048},
    # for a machine without a GPU: does the script run?
    "tiny": {**LINEAR, "head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "hidden_size": 64,
             "linear_num_key_heads": 2, "linear_num_value_heads": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 512},
}
MICRO = {
    "stock": (8, 4), "ar": (8, 4), "flare": (4, 2, 1), "draft": (4, 2), "adapter": (8, 4), "ar-recompute": (8,),
    "flare-recompute": (4, 2, 1), "adapter-recompute": (8,), "flare-4B": (4,), "adapter-9B": (4,),
}
"""Rows of a micro batch that are tried, by part."""
SHAPE_OF = {"flare-4B": "4B", "adapter-9B": "9B"}
"""Parts with a shape of their own."""
ADAPTER = ["adapter.rank=64", "adapter.alpha=64", "objective.ar_weight=0", "mask_token=vector"]
AGAIN = ["train.memory=recompute"]
RECIPES: dict[str, tuple[str, list[str]]] = {
    "ar": ("draft", ["objective.diffusion_weight=0"]), "flare": ("flare", []), "draft": ("draft", []),
    "adapter": ("draft", ADAPTER), "ar-recompute": ("draft", ["objective.diffusion_weight=0", *AGAIN]),
    "flare-recompute": ("flare", AGAIN), "adapter-recompute": ("draft", [*ADAPTER, *AGAIN]),
    "flare-4B": ("flare", AGAIN), "adapter-9B": ("draft", [*ADAPTER, *AGAIN]),
}
PARTS = tuple(MICRO)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GIB = 2**30
MEMORY: dict[str, tuple[float, float | None]] = {
    "flare": (55.0, None), "flare-recompute": (55.0, 45.0), "adapter-recompute": (24e9 / GIB, None),
    "flare-4B": (141e9 / GIB, None), "adapter-9B": (80e9 / GIB, None),
}
"""Bar and aim of the peak in GiB, by part: what cards have, and for flare of the 2B shape less."""
Span = tuple[int, int]


def build(shape: str) -> Any:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    given = {"tie_word_embeddings": True, "eos_token_id": None, "pad_token_id": 0, **SHAPES[shape]}
    config = Qwen3_5TextConfig(**given)
    with torch.device(DEVICE):
        model = Qwen3_5ForCausalLM._from_config(config, dtype=torch.bfloat16)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.eval()


def sizes(model: Any) -> tuple[int, int]:
    """(parameters, tied ones once; those of the head)."""
    seen = {value.data_ptr(): value.numel() for value in model.parameters()}
    return sum(seen.values()), model.get_input_embeddings().weight.numel()


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], count: int) -> float:
    """Per step, back to back: the host may run ahead as it does in a run."""
    wait()
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return (time.perf_counter() - start) / count


def kernels_of(step: Callable[[], object], count: int = 2) -> list[tuple[str, Span]]:
    """The kernels that some steps run on the GPU, by name, with when they ran in ns."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    wait()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(count):
            step()
        wait()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    return [
        (event.name(), (event.start_ns(), event.start_ns() + event.duration_ns()))
        for event in recorded.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA
        and event.duration_ns() > 0
        and not event.name().startswith(("ProfilerStep", "Optimizer.", "gpu_user_annotation", "nccl:"))
    ]


def union(spans: Iterable[Span]) -> list[Span]:
    """Disjoint spans of time, in order."""
    found: list[Span] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], last)
        else:
            found.append((first, last))
    return found


def length(spans: Iterable[Span]) -> int:
    return sum(last - first for first, last in spans)


def idle_share(step: Callable[[], object]) -> float | None:
    """Share of the time between the first and the last kernel of some steps in which none runs."""
    busy = union(span for _, span in kernels_of(step)) if CUDA else []
    return 1 - length(busy) / (busy[-1][1] - busy[0][0]) if busy else None


def matmul_rate() -> float:
    """FLOP per second of a large bfloat16 product."""
    size = 8192 if CUDA else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    seconds_of(lambda: a @ b, 5)
    return 2 * size**3 / seconds_of(lambda: a @ b, 20)


def tries(micro: Sequence[int], measure: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """One result per micro batch; what does not fit into memory says so."""
    found = []
    for rows in micro:
        try:
            found.append({"micro_rows": rows, **measure(rows)})
        except torch.OutOfMemoryError as error:
            found.append({"micro_rows": rows, "error": f"out of memory: {str(error).splitlines()[0][:120]}"})
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        print(json.dumps(found[-1]), flush=True)
    return found


def measured(step: Callable[[], object], options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    seconds_of(step, 1)
    first = time.perf_counter() - start
    seconds_of(step, 1)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    times = sorted(seconds_of(step, 2) for _ in range(1 if options.quick else 3))
    peak = torch.cuda.max_memory_allocated() / GIB if CUDA else None
    return {"seconds": times[len(times) // 2], "spread": times[-1] - times[0], "first_step_seconds": first,
            "peak_gib": peak, "idle_share": idle_share(step)}


def library() -> str | None:
    """Version of flash-linear-attention, with its refusal of Hopper lifted as in the kernels' benchmark; else None."""
    from flarec.bench import baselines

    version = baselines.version()
    if version is not None:
        baselines.Baselines()
    return version


def stock(options: argparse.Namespace) -> dict[str, Any]:
    version = library()
    model = build(options.shape).train()
    model.config.use_cache = False
    parameters, head = sizes(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (options.rows, options.length), device=DEVICE)

    def measure(micro: int) -> dict[str, Any]:
        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            for part in ids.split(micro):
                loss = model(input_ids=part, labels=part, use_cache=False).loss
                (loss * (len(part) / options.rows)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        try:
            return {**measured(step, options), "processed": ids.numel(), "head_rows": ids.numel()}
        finally:
            optimizer.zero_grad(set_to_none=True)

    return {"tries": tries(options.micro, measure), "parameters": parameters, "head": head, "library": version}


def stream(rows: int, length: int, vocabulary: int) -> Any:
    """Rows of one document of random tokens, all but the first its response."""
    import numpy as np

    from flarec.train.data.packing import RowStream
    from flarec.train.data.sources import DataStats, TokenSource

    tokens = np.random.default_rng(0).integers(3, vocabulary - 8, size=rows * length).astype(np.int32)
    spans, index = np.array([[1, length]] * rows), np.arange(rows + 1)
    source = TokenSource(DataStats("random"), 1.0, tokens, index * length, spans, index, index[:-1])
    return RowStream([source], max_length=length, seed=0, lookahead=rows)


def ours(options: argparse.Namespace) -> dict[str, Any]:
    from flarec.device import resolve_compile
    from flarec.frontend.export import capture
    from flarec.passes import lower
    from flarec.recipe import load_recipe
    from flarec.train.adapter import adapter_of, start_adapter
    from flarec.train.loop import Trainer
    from flarec.train.mask_token import MaskToken
    from flarec.train.memory import measure_row, state_bytes

    model = build(options.shape)
    parameters, head = sizes(model)
    base, more = RECIPES[options.part]
    more = [*more, f"train.compile={options.compile}"]
    captured, adapter = capture(model), adapter_of(load_recipe(base).override(more))
    compiles = resolve_compile(options.compile, torch.device(DEVICE))
    start_adapter(captured, load_recipe(base).override(more), 0, print)
    program = lower(
        captured, "train", mask_vector=adapter is not None, kernels="triton" if CUDA else "torch", adapter=adapter,
        regions=compiles,
    )
    vocabulary = model.config.vocab_size
    mask = MaskToken("vector", vocabulary) if adapter else MaskToken("row", vocabulary - 1)

    chosen = load_recipe(base).override([
        f"optimizer.batch_rows={options.rows}", f"data.max_length={options.length}", "optimizer.lr=1e-6",
        "optimizer.warmup_steps=0", "train.memory=keep", "optimizer.precision=bf16", "optimizer.steps=1000",
    ]).override(more)
    weights = torch.cuda.memory_allocated() if CUDA else 0
    fixed, row = weights + state_bytes(program, chosen, 1), measure_row(program, chosen, mask)

    def measure(micro: int) -> dict[str, Any]:
        recipe = chosen.override([f"optimizer.micro_rows={micro}"])
        predicted = fixed + row.of(micro, recompute=recipe.train.memory == "recompute")
        rows = stream(options.rows, options.length, model.config.vocab_size)
        trainer = Trainer(program, recipe, mask, rows, seed=0)
        last: list[Any] = []

        def step() -> None:
            last[:] = [trainer.advance()]

        try:
            result = measured(step, options)
            done, given = last[0], trainer.feed.take(trainer.step)
            heads = sum(len(batch.head_rows) for batch in given.batches)
            values = done.read(None)
            return {**result, "processed": done.clean_tokens + done.noisy_tokens, "head_rows": heads,
                    "loss": values["loss"], "predicted_gib": predicted / GIB,
                    "pipeline": [record.step for record in program.history]}
        finally:
            for parameter in program.parameters().values():
                parameter.grad = None

    return {"tries": tries(options.micro, measure), "parameters": parameters, "head": head}


def warm_stock(index: int, count: int) -> None:
    """Compile each `count`-th configuration of the library's kernels that the stock model tunes."""
    from flarec.bench.warm import take_slice

    take_slice(index, count)
    if library() is None:
        return
    model = build("warm").train()
    ids = torch.randint(0, 2000, (2, 512), device=DEVICE)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    wait()


def part_command(options: argparse.Namespace, part: str, *more: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--part", part, "--shape", options.shape,
            "--rows", str(options.rows), "--length", str(options.length), "--compile", options.compile,
            *(["--quick"] if options.quick else []), *more]


def environment(options: argparse.Namespace, part: str) -> dict[str, str]:
    """With the library for the stock model alone."""
    values = dict(os.environ)
    if options.library and part.endswith("stock"):
        values["PYTHONPATH"] = os.pathsep.join(filter(None, (str(options.library), values.get("PYTHONPATH"))))
    return values


def compile_ahead(options: argparse.Namespace, parts: Sequence[str], limit: float) -> dict[str, str]:
    """Kernels of all parts into Triton's cache, in processes side by side; says how each ended."""
    count = max(1, min(12, (os.cpu_count() or 1) - 3))
    commands = {f"warm-stock {i}": ("warm-stock", ["--slice", str(i), str(count)]) for i in range(count)}
    if "stock" not in parts:
        commands = {}
    for part in set(parts) - {"stock"}:
        shape = "warm-large" if part in SHAPE_OF else "warm"
        commands[part] = (part, ["--shape", shape, "--rows", "1", "--micro", "1", "--quick"])
    running = {
        name: subprocess.Popen(
            part_command(options, part, *more), env=environment(options, part), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )
        for name, (part, more) in commands.items()
    }
    end, ended = time.monotonic() + limit, {}
    for name, process in running.items():
        try:
            _, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
            ended[name] = "done" if process.returncode == 0 else errors.strip().splitlines()[-1][:200]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            ended[name] = "stopped: no time left"
    return ended


def run_part(options: argparse.Namespace, part: str, limit: float) -> dict[str, Any]:
    """The part's result, or {"error": why not}."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        micro = [str(n) for n in (options.micro or MICRO[part])]
        shape = SHAPE_OF.get(part, options.shape) if options.shape == "2B" else options.shape
        command = part_command(options, part, "--result", str(path), "--shape", shape, "--micro", *micro)
        try:
            done = subprocess.run(command, env=environment(options, part), stderr=subprocess.PIPE, text=True,
                                  timeout=max(1.0, limit))
        except subprocess.TimeoutExpired:
            return {"error": "no time left"}
        if done.returncode or not path.is_file():
            return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def chosen(result: dict[str, Any], memory: float | None) -> dict[str, Any] | None:
    """The fastest try within `memory` GiB, else the fastest."""
    fitting = [one for one in result.get("tries", ()) if "seconds" in one]
    small = [one for one in fitting if memory is not None and one["peak_gib"] is not None and one["peak_gib"] <= memory]
    return min(small or fitting, key=lambda one: float(one["seconds"]), default=None)


def rows_of(results: dict[str, dict[str, Any]], rate: float, clean: int) -> list[dict[str, Any]]:
    """Lines in the form of the kernels' benchmark."""
    from flarec.bench.session import verdict

    best = {part: chosen(result, MEMORY.get(part, (None, None))[0]) for part, result in results.items()}
    base = best.get("stock")
    lines: list[dict[str, Any]] = []

    def line(name: str, title: str, unit: str, value: float | None, part: str, bar: float | None = None,
             aim: float | None = None, at_least: bool = False, why: str | None = None) -> None:
        found = best.get(part) or {}
        lines.append({
            "name": name, "title": title, "unit": unit, "bar": bar, "aim": aim, "at_least": at_least,
            "status": "measured" if value is not None else "not measured", "value": value,
            "verdict": None if value is None else verdict(value, bar, aim, at_least),
            "values": {key: found[key] for key in ("micro_rows", "seconds", "spread", "peak_gib", "idle_share",
                                                   "first_step_seconds", "loss") if key in found},
            "message": None if value is not None else why or results.get(part, {}).get("error", "nothing fitted"),
        })

    for part in results:
        found = best[part]
        per_token = 1e6 * found["seconds"] / clean if found else None
        line(f"{part}-us-per-token", f"{part}: time per clean token", "us", per_token, part)
    for part, bar, aim in (
        ("ar", 0.8, 0.65), ("flare", 2.2, 1.7), ("draft", 1.6, 1.2), ("flare-recompute", 2.2, 1.7),
    ):
        if part in results:
            found = best[part]
            ratio = found["seconds"] / base["seconds"] if found and base else None
            why = None if base else f"no stock step: {results.get('stock', {}).get('error', 'not run')}"
            line(f"{part}-to-stock", f"{part}: time per clean token to stock's", "x", ratio, part, bar, aim, why=why)
    for part, other in (("adapter", "ar"), ("adapter-recompute", "ar-recompute")):
        if part not in results:
            continue
        found, plain = best[part], best.get(other)
        ratio = found["seconds"] / plain["seconds"] if found and plain else None
        line(f"{part}-to-ar", f"{part}: time per clean token to {other}'s", "x", ratio, part, 1.6, 1.2, why="no ar")
        ours, theirs = (
            {one["micro_rows"]: one["peak_gib"] for one in results.get(name, {}).get("tries", ()) if "seconds" in one}
            for name in (part, other)
        )
        rows = max(ours.keys() & theirs.keys(), default=0)
        ratio = ours[rows] / theirs[rows] if rows and ours[rows] and theirs[rows] else None
        line(f"{part}-memory-to-ar", f"{part}: peak memory to {other}'s, {rows} rows each", "x", ratio, part,
             0.4, 0.3, why="ar not run")
    for part, result in results.items():
        found = best[part]
        work = share = None
        if found:
            body = result["parameters"] - result["head"]
            work = 6 * (body * found["processed"] + result["head"] * found["head_rows"])
            share = work / found["seconds"] / rate
        line(f"{part}-mfu", f"{part}: exact MFU", "", share, part, 0.45 if part == "flare" else None, at_least=True)
        line(f"{part}-peak", f"{part}: peak memory", "GiB", found["peak_gib"] if found else None, part,
             *MEMORY.get(part, (None, None)))
        line(f"{part}-idle", f"{part}: idle share of the GPU", "", found["idle_share"] if found else None, part,
             0.04 if part == "flare" else None)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--quick", action="store_true", help="shorter timings")
    parser.add_argument("--only", action="append", choices=PARTS, default=[])
    parser.add_argument("--library", type=Path, help="a folder with flash-linear-attention, for the stock model alone")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="2B")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--micro", type=int, nargs="*")
    parser.add_argument("--time-limit", type=float, default=440.0)
    parser.add_argument("--no-warm", action="store_true", help="compile nothing in advance")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="of our steps, by region")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--slice", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "warm-stock":
        warm_stock(*options.slice)
        return 0
    if options.part:
        result = (stock if options.part == "stock" else ours)(options)
        if options.result:
            options.result.write_text(json.dumps(result))
        return 0
    return measure_all(options)


def measure_all(options: argparse.Namespace) -> int:
    import transformers

    start, parts = time.monotonic(), options.only or list(PARTS)
    warmed = {} if options.no_warm else compile_ahead(options, parts, 0.35 * options.time_limit)
    print(f"{time.monotonic() - start:.0f} s: compiled ahead: {warmed}", flush=True)
    rate, results = matmul_rate(), {}
    if CUDA:
        torch.cuda.empty_cache()
    for part in parts:
        results[part] = run_part(options, part, options.time_limit - (time.monotonic() - start))
        print(f"{time.monotonic() - start:.0f} s: {part}: {results[part].get('error', 'measured')}", flush=True)
    lines = rows_of(results, rate, options.rows * options.length)
    for one in lines:
        print(f"{one['title']:<44} {one['value'] if one['value'] is None else round(one['value'], 3)} {one['unit']} "
              f"{one['verdict'] or one['message']}", flush=True)
    if options.out:
        record = {
            "device": torch.cuda.get_device_name() if CUDA else f"{platform.machine()} CPU",
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__, "cuda": torch.version.cuda,
                         "flash-linear-attention": results.get("stock", {}).get("library")},
            "command": " ".join(["python benchmarks/train_steps.py", *sys.argv[1:]]),
            "commit": options.commit, "seconds": round(time.monotonic() - start, 1), "shape": options.shape,
            "clean_tokens": options.rows * options.length, "ceilings": {"bf16_tflops": rate / 1e12},
            "compiled_ahead": warmed, "parts": results, "rows": lines,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(one["verdict"] == "missed" for one in lines))


if __name__ == "__main__":
    sys.exit(main())
