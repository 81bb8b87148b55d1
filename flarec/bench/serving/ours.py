"""Steps of the engine in steady state: everything between two reports, the copy to the host included."""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import dataclass

import torch

from flarec.base.generation import GenerationOptions, Mode
from flarec.decode.prefill import Prefill
from flarec.decode.rows import Rows
from flarec.kernels.sampling import choose

from .models import ServingSession

WARM_STEPS = 6  # run, checked, captured, and a few more


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step (median), waits for the device in it, and whether it was the replay of a graph."""

    ms: float
    waits: float
    replayed: bool


def step_time(
    session: ServingSession, mode: Mode, requests: int, *, context: int | None = None, graphs: str = "auto"
) -> StepTime:
    """A step of `requests` requests in one mode. The shape of a step does not depend on what is accepted."""
    steps = session.steps if graphs == "auto" else min(session.steps, 20)

    def measure() -> StepTime:
        engine = session.engine(requests, graphs=graphs)
        options = GenerationOptions(mode=mode, max_new_tokens=1 << 14, threshold=1.0)
        running = [engine.add(prompt, options) for prompt in session.prompts(requests, context)]
        while any(not request.tokens for request in running):
            engine.step()
        for _ in range(WARM_STEPS):
            engine.step()
        session.wait()
        before = engine.stats.replays
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            engine.step()
            times.append(1e3 * (time.perf_counter() - start))
        replayed = engine.stats.replays - before == steps
        return StepTime(statistics.median(times), _waits(session, engine.step), replayed)

    return session.measured(("step", mode, requests, context, graphs), measure)


def _waits(session: ServingSession, step: object, count: int = 5) -> float:
    """Per step: the waits that CUDA's debug mode reports, and the event behind which the result lies."""
    assert callable(step)
    if not session.on_gpu:
        return 0.0
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(count):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return 1 + sum("synchroniz" in str(item.message) for item in found) / count


def prefill_ms(session: ServingSession, tokens: int) -> float:
    """One prompt, read in one forward; the fastest of three."""

    def once() -> float:
        engine = session.engine(1)
        request = engine.add(session.prompts(1, tokens)[0], mode="causal", max_new_tokens=2)
        rows = Rows(session.program, engine._mode(request.options), [request], [request.options], None)
        prefill = Prefill(rows, tokens)
        session.wait()
        start = time.perf_counter()
        with torch.no_grad():
            prefill.advance()
        session.wait()
        return 1e3 * (time.perf_counter() - start)

    return session.measured(("prefill", tokens), lambda: min(once() for _ in range(3)))


def sampling_ms(session: ServingSession, rows: int) -> float:
    """Temperature 0.7, top-k 20, top-p 0.95 for `rows` rows of float32 logits."""

    def measure() -> float:
        device = session.device
        logits = 3 * torch.randn(rows, session.vocabulary, device=device)
        place = torch.arange(rows, device=device)
        temperature, top_p = torch.full((rows,), 0.7, device=device), torch.full((rows,), 0.95, device=device)
        top_k = torch.full((rows,), 20, device=device)
        given = (logits, temperature, top_k, top_p, place, place)
        return session.clock.graph_ms([lambda: choose(*given, confidence=False)])

    return session.measured(("sampling", rows), measure)
