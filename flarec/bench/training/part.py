"""One part of the benchmark in a process of its own: `python -m flarec.bench.training.part PLAN [RESULT]`.

PLAN is the JSON of a `PartPlan`; RESULT gets what was measured after every try, so that a process that runs out of time
leaves what it has.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..shapes import build
from .profile import kernels_of, seconds_of, shares, wait
from .shapes import RECIPES, PartPlan, sizes

GIB = 2**30
Keep = Callable[[dict[str, Any]], None]


def measured(step: Callable[[], object], plan: PartPlan) -> dict[str, Any]:
    """Seconds of a step (median), its peak and profile; the first one apart."""
    cuda = plan.device.startswith("cuda")
    start = time.perf_counter()
    seconds_of(step, 1)
    first = time.perf_counter() - start
    seconds_of(step, 1)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = sorted(seconds_of(step, 2) for _ in range(1 if plan.quick else 3))
    peak = torch.cuda.max_memory_allocated() / GIB if cuda else None
    found = {"seconds": times[len(times) // 2], "spread": times[-1] - times[0], "first_step_seconds": first,
             "peak_gib": peak}
    return {**found, "shares": shares(kernels_of(step)) if cuda else {}}


def tries(plan: PartPlan, measure: Callable[[int], dict[str, Any]], keep: Callable[[list[Any]], None]) -> None:
    """One result per micro batch, until one fits or of all; what does not fit into memory says so."""
    found: list[dict[str, Any]] = []
    for rows in plan.micro:
        if found and "error" not in found[-1] and not plan.every:
            break
        try:
            found.append({"micro_rows": rows, **measure(rows)})
        except torch.OutOfMemoryError as error:
            found.append({"micro_rows": rows, "error": f"out of memory: {str(error).splitlines()[0][:120]}"})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        keep(found)


def library() -> str | None:
    """Version of flash-linear-attention, with its refusal of Hopper lifted as in the kernels' benchmark; else None."""
    from flarec.bench import baselines

    version = baselines.version()
    if version is not None:
        baselines.Baselines()
    return version


def stock(plan: PartPlan, keep: Keep) -> None:
    """Autoregressive fine-tuning of the transformers model; compiled: each decoder layer by torch.compile."""
    version = library() if plan.device.startswith("cuda") else None
    model = build(plan.shape, plan.device).train()
    model.config.use_cache = False
    parameters, head = sizes(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (plan.rows, plan.length), device=plan.device)
    if plan.part == "stock-compiled":
        for layer in model.model.layers:
            layer.compile()

    def measure(micro: int) -> dict[str, Any]:
        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            for part in ids.split(micro):
                loss = model(input_ids=part, labels=part, use_cache=False).loss
                (loss * (len(part) / plan.rows)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        try:
            return {**measured(step, plan), "processed": ids.numel(), "head_rows": ids.numel()}
        finally:
            optimizer.zero_grad(set_to_none=True)

    known = {"parameters": parameters, "head": head, "library": version}
    tries(plan, measure, lambda found: keep({"tries": found, **known}))


def stream(plan: PartPlan, vocabulary: int) -> Any:
    """Rows of one document of random tokens, all but the first its response."""
    import numpy as np

    from flarec.train.data.packing import RowStream
    from flarec.train.data.sources import DataStats, TokenSource

    rows, length = plan.rows, plan.length
    tokens = np.random.default_rng(0).integers(3, vocabulary - 8, size=rows * length).astype(np.int32)
    spans, index = np.array([[1, length]] * rows), np.arange(rows + 1)
    source = TokenSource(DataStats("random"), 1.0, tokens, index * length, spans, index, index[:-1])
    return RowStream([source], max_length=length, seed=0, lookahead=rows)


def lowered(plan: PartPlan, model: Any, base: str, more: Sequence[str]) -> Any:
    """The training program of a model, and its mask token."""
    from flarec.device import resolve_compile
    from flarec.frontend.export import capture
    from flarec.passes import lower
    from flarec.recipe import load_recipe
    from flarec.train.adapter import adapter_of, start_adapter
    from flarec.train.mask_token import MaskToken

    recipe, captured = load_recipe(base).override(more), capture(model)
    adapter, vocabulary = adapter_of(recipe), model.config.vocab_size
    start_adapter(captured, recipe, 0, lambda text: None)
    program = lower(
        captured, "train", mask_vector=adapter is not None, adapter=adapter,
        kernels="triton" if plan.device.startswith("cuda") else "torch",
        regions=resolve_compile(plan.compile, torch.device(plan.device)),
    )
    return program, MaskToken("vector", vocabulary) if adapter else MaskToken("row", vocabulary - 1)


def ours(plan: PartPlan, keep: Keep) -> None:
    """A recipe of ours on the same rows."""
    from flarec.recipe import load_recipe
    from flarec.train.loop import Trainer
    from flarec.train.memory import measure_row, state_bytes

    model, first_only = build(plan.shape, plan.device), plan.part == "first-step"
    parameters, head = sizes(model)
    base, more = RECIPES["flare" if first_only else plan.part]
    program, mask = lowered(plan, model, base, more)
    chosen = load_recipe(base).override([
        f"optimizer.batch_rows={plan.rows}", f"data.max_length={plan.length}", "optimizer.lr=1e-6",
        "optimizer.warmup_steps=0", "train.memory=keep", "optimizer.precision=bf16", "optimizer.steps=1000",
        f"train.compile={plan.compile}", *more,
    ])
    weights = torch.cuda.memory_allocated() if plan.device.startswith("cuda") else 0
    fixed = weights + state_bytes(program, chosen, 1)
    row = None if first_only else measure_row(program, chosen, mask)

    def measure(micro: int) -> dict[str, Any]:
        recipe, data = chosen.override([f"optimizer.micro_rows={micro}"]), stream(plan, model.config.vocab_size)
        trainer = Trainer(program, recipe, mask, data, seed=0)
        last: list[Any] = []

        def step() -> None:
            last[:] = [trainer.advance()]

        try:
            if row is None:
                return {"seconds": seconds_of(step, 1)}
            result, done = measured(step, plan), last[0]
            heads = sum(len(batch.head_rows) for batch in trainer.feed.take(trainer.step).batches)
            expected = fixed + row.of(micro, recompute=recipe.train.memory == "recompute")
            return {**result, "processed": done.clean_tokens + done.noisy_tokens, "head_rows": heads,
                    "loss": done.read(None)["loss"], "predicted_gib": expected / GIB,
                    "pipeline": [record.step for record in program.history]}
        finally:
            for parameter in program.parameters().values():
                parameter.grad = None

    tries(plan, measure, lambda found: keep({"tries": found, "parameters": parameters, "head": head}))


def doctor(plan: PartPlan, keep: Keep) -> None:
    """What `flarec doctor` predicts of a step of `flare`: seconds of all its micro batches, and the peak."""
    from flarec.doctor.rates import measure, seconds_of
    from flarec.doctor.steps import simulate_training
    from flarec.frontend.export import capture
    from flarec.passes import lower
    from flarec.recipe import load_recipe

    model, device = build(plan.shape, "meta"), torch.device(plan.device)
    recipe, program = load_recipe("flare").override(["train.memory=keep"]), lower(capture(model), "train")
    rates = measure(device, torch.bfloat16, int(model.config.hidden_size))

    def predict(micro: int) -> dict[str, Any]:
        step = simulate_training(program, recipe, length=plan.length, batch=micro, device=device)
        seconds = plan.rows // micro * seconds_of(step.micro_batch, rates) + seconds_of(step.update, rates)
        return {"seconds": seconds, "peak_gib": step.memory.total / GIB}

    tries(plan, predict, lambda found: keep({"tries": found}))


def warm_stock(index: int, count: int, device: str) -> None:
    """Compile each `count`-th configuration of the library's kernels that the stock model tunes."""
    from flarec.bench.warm import take_slice

    take_slice(index, count)
    if library() is None:
        return
    model = build("warm", device).train()
    ids = torch.randint(0, 2000, (2, 512), device=device)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    wait()


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "warm-stock":
        warm_stock(int(arguments[1]), int(arguments[2]), arguments[3])
        return
    given = json.loads(arguments[0])
    plan = PartPlan(**{**given, "micro": tuple(given["micro"])})

    def keep(result: dict[str, Any]) -> None:
        if len(arguments) > 1:
            path = Path(arguments[1])
            path.with_suffix(".new").write_text(json.dumps(result))
            path.with_suffix(".new").replace(path)

    kinds = {"stock": stock, "stock-compiled": stock, "doctor": doctor}
    kinds.get(plan.part, ours)(plan, keep)


if __name__ == "__main__":
    main(sys.argv[1:])
