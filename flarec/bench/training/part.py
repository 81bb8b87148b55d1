"""Parts of the benchmark in a process of their own: `python -m flarec.bench.training.part PLANS [RESULT [LAUNCHED]]`,
or `... warm-stock INDEX COUNT PLANS`.

PLANS is the JSON of a list of `PartPlan`, whose first one builds what the others share; RESULT gets what was measured
by part after every try, so that a process that runs out of time leaves what it has. LAUNCHED: when the process was
asked for, in seconds of `time.time`.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..shapes import build
from .profile import kernels_of, seconds_of, shares, wait
from .shapes import AHEAD_LAYERS, PREDICTED, RECIPES, PartPlan, sizes

GIB = 2**30
Keep = Callable[[str, dict[str, Any]], None]
"""Called with a part and all that is known of it."""


def measured(step: Callable[[], object], plan: PartPlan) -> dict[str, Any]:
    """Seconds of a step (median), its peak and profile; the first one apart, with the moment when it was done."""
    cuda = plan.device.startswith("cuda")
    start = time.perf_counter()
    seconds_of(step, 1)
    first, moment = time.perf_counter() - start, time.time()
    seconds_of(step, 1)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = sorted(seconds_of(step, 2) for _ in range(1 if plan.quick else 3))
    peak = torch.cuda.max_memory_allocated() / GIB if cuda else None
    found = {"seconds": times[len(times) // 2], "spread": times[-1] - times[0], "first_step_seconds": first,
             "first_step_at": moment, "peak_gib": peak}
    return {**found, "shares": shares(kernels_of(step, 1 if plan.quick else 2)) if cuda else {}}


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


def built(plan: PartPlan) -> Any:
    """The model of a plan: on its device, ahead a few layers of it."""
    return build(plan.shape, plan.device, layers=AHEAD_LAYERS if plan.ahead else None)


def stock(plans: Sequence[PartPlan], keep: Keep) -> None:
    """Autoregressive fine-tuning of the transformers model; compiled: each decoder layer by torch.compile."""
    if plans[0].ahead and plans[0].device.startswith("cuda"):
        from flarec.bench.warm import take_slice

        take_slice(0, sys.maxsize)  # others compile what is tuned
    version = library() if plans[0].device.startswith("cuda") else None
    model = built(plans[0]).train()
    model.config.use_cache = False
    parameters, head = sizes(model)
    known = {"parameters": parameters, "head": head, "library": version}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    for plan in plans:
        ids = torch.randint(0, model.config.vocab_size, (plan.rows, plan.length), device=plan.device)
        if plan.part == "stock-compiled":
            for layer in model.model.layers:
                layer.compile()

        def measure(micro: int, plan: PartPlan = plan, ids: torch.Tensor = ids) -> dict[str, Any]:
            def passes(parts: Sequence[torch.Tensor]) -> None:
                for part in parts:
                    loss = model(input_ids=part, labels=part, use_cache=False).loss
                    (loss * (len(part) / plan.rows)).backward()

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)
                passes(ids.split(micro))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()

            try:
                if plan.ahead:
                    return {"seconds": seconds_of(lambda: passes(ids[:micro].split(micro)), 1)}
                return {**measured(step, plan), "processed": ids.numel(), "head_rows": ids.numel()}
            finally:
                optimizer.zero_grad(set_to_none=True)

        tries(plan, measure, lambda found, part=plan.part: keep(part, {"tries": found, **known}))  # type: ignore[misc]


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


@dataclass
class Steps:
    """Our steps of one program: what parts of a process share."""

    plan: PartPlan
    model: Any
    program: Any
    mask: Any

    def recipe(self, micro: int) -> Any:
        from flarec.recipe import load_recipe

        base, more = RECIPES[self.plan.part]
        rows = micro if self.plan.ahead else self.plan.rows
        return load_recipe(base).override([
            f"optimizer.batch_rows={rows}", f"optimizer.micro_rows={micro}", f"data.max_length={self.plan.length}",
            "optimizer.lr=1e-6", "optimizer.warmup_steps=0", "train.memory=keep", "optimizer.precision=bf16",
            "optimizer.steps=1000", f"train.compile={self.plan.compile}", *more,
        ])

    def measure(self, micro: int) -> dict[str, Any]:
        from flarec.train.loop import Trainer

        recipe = self.recipe(micro)
        trainer = Trainer(self.program, recipe, self.mask, stream(self.plan, self.model.config.vocab_size), seed=0)
        last: list[Any] = []

        def step() -> None:
            last[:] = [trainer.advance()]

        try:
            if self.plan.ahead:
                batches = trainer.feed.take(0).batches
                return {"seconds": seconds_of(lambda: trainer.accumulate(batches), 1)}
            if self.plan.part == "first-step":
                return {"seconds": seconds_of(step, 1), "first_step_at": time.time()}
            result, done = measured(step, self.plan), last[0]
            heads = sum(len(batch.head_rows) for batch in trainer.feed.take(trainer.step).batches)
            return {**result, "processed": done.clean_tokens + done.noisy_tokens, "head_rows": heads,
                    "loss": done.read(None)["loss"], "pipeline": [record.step for record in self.program.history]}
        finally:
            trainer.weights.forget()
            for parameter in self.program.parameters().values():
                parameter.grad = None

    def predicted(self, needs: Any, one: dict[str, Any]) -> float:
        """GiB that `train.memory = auto` expects of a try, from what a row needs."""
        from flarec.train.memory import state_bytes

        recipe = self.recipe(1)
        fixed = torch.cuda.memory_allocated() + state_bytes(self.program, recipe, 1)
        again = recipe.train.memory == "recompute"
        return float(fixed + needs.of(one["micro_rows"], recompute=again)) / GIB


def ours(plans: Sequence[PartPlan], keep: Keep) -> None:
    """Recipes of ours on the same rows; all with the program of the first plan."""
    from flarec.train.memory import measure_row

    model = built(plans[0])
    parameters, head = sizes(model)
    program, mask = lowered(plans[0], model, *RECIPES[plans[0].part])
    every: list[tuple[Steps, list[dict[str, Any]]]] = []

    def known(steps: Steps, found: list[dict[str, Any]]) -> None:
        keep(steps.plan.part, {"tries": found, "parameters": parameters, "head": head})

    for plan in plans:
        steps, found = Steps(plan, model, program, mask), list[dict[str, Any]]()
        every.append((steps, found))

        def noted(result: list[Any], steps: Steps = steps, found: list[dict[str, Any]] = found) -> None:
            found[:] = result
            known(steps, found)

        tries(plan, steps.measure, noted)
    if plans[0].part in PREDICTED and plans[0].device.startswith("cuda") and not plans[0].ahead:
        needs = measure_row(program, every[0][0].recipe(1), mask)
        for steps, found in every:
            for one in found:
                one["predicted_gib"] = steps.predicted(needs, one)
            known(steps, found)


def doctor(plan: PartPlan, keep: Keep) -> None:
    """What `flarec doctor` predicts of a step of `flare`: its work, which a session prices, and the peak."""
    from flarec.doctor.steps import simulate_training, training_program
    from flarec.frontend.export import capture
    from flarec.recipe import load_recipe

    device = torch.device(plan.device)
    recipe = load_recipe("flare").override(["train.memory=keep", f"train.compile={plan.compile}"])
    program = training_program(capture(build(plan.shape, "meta")), recipe, device)

    def predict(micro: int) -> dict[str, Any]:
        step = simulate_training(program, recipe, length=plan.length, batch=micro, device=device)
        work = step.micro_batch.times(plan.rows // micro) + step.update
        return {"seconds": None, "work": work.listed(), "peak_gib": step.memory.total / GIB}

    tries(plan, predict, lambda found: keep(plan.part, {"tries": found}))


def warm_stock(index: int, count: int, plan: PartPlan) -> None:
    """Compile each `count`-th configuration of the library's kernels that the stock model tunes."""
    from flarec.bench.warm import take_slice

    take_slice(index, count)
    if library() is None:
        return
    model = build("warm", plan.device).train()
    # the length of the run: Triton compiles once more for a number of chunks that 16 does not divide
    ids = torch.randint(0, 2000, (2, plan.length), device=plan.device)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    wait()


def plans_of(text: str) -> list[PartPlan]:
    return [PartPlan(**{**given, "micro": tuple(given["micro"])}) for given in json.loads(text)]


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "warm-stock":
        warm_stock(int(arguments[1]), int(arguments[2]), plans_of(arguments[3])[0])
        return
    plans = plans_of(arguments[0])
    launched, results = float(arguments[2]) if len(arguments) > 2 else time.time(), dict[str, Any]()

    def keep(part: str, result: dict[str, Any]) -> None:
        results[part] = {**result, "launched": launched}
        if len(arguments) > 1:
            path = Path(arguments[1])
            path.with_suffix(".new").write_text(json.dumps(results))
            path.with_suffix(".new").replace(path)

    if plans[0].part == "doctor":
        doctor(plans[0], keep)
    else:
        (stock if plans[0].part.startswith("stock") else ours)(plans, keep)


if __name__ == "__main__":
    main(sys.argv[1:])
