"""What transformers alone does: `generate`, and a forward of one token with a static cache, as a CUDA graph."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from ..baselines import beside
from ..measure import NotMeasured
from .models import TURNS, ServingSession
from .processes import printed

LIMIT = 120.0
"""Seconds of the process that has the library: most of them tune its kernels."""


def graph_step_ms(session: ServingSession, requests: int) -> float:
    """A forward of one token per request and its argmax, replayed as a graph; on the CPU, run. The host waits for each.
    """

    def measure() -> float:
        from transformers import StaticCache

        model, context = session.model, session.context
        prompts = torch.tensor(session.prompts(requests), device=session.device)
        with torch.no_grad():
            past = StaticCache(config=model.config, max_cache_len=2 * context)
            model(prompts, past_key_values=past, use_cache=True, logits_to_keep=1)
            token = prompts[:, :1].clone()
            position = torch.full((requests, 1), context, device=session.device)

            def step() -> torch.Tensor:
                logits = model(token, position_ids=position, past_key_values=past, use_cache=True).logits
                chosen: torch.Tensor = logits.argmax(dim=-1)
                return chosen

            return _median_ms(session, _graph(session, step), session.steps)

    return session.measured(("stock graph", requests), measure)


def _graph(session: ServingSession, step: Callable[[], object]) -> Callable[[], object]:
    if not session.on_gpu:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _median_ms(session: ServingSession, step: Callable[[], object], count: int) -> float:
    """The lowest of some medians, as of our own steps."""
    medians = []
    for _ in range(TURNS if session.on_gpu else 1):
        times = []
        for _ in range(count):
            session.wait()
            start = time.perf_counter()
            step()
            session.wait()
            times.append(1e3 * (time.perf_counter() - start))
        medians.append(statistics.median(times))
    return min(medians)


def generate_ms(session: ServingSession, requests: int, tokens: int = 24) -> float:
    """`generate` as it is, greedy: milliseconds per token of each request, from runs of two lengths."""

    def measure() -> float:
        ids = torch.tensor(session.prompts(requests), device=session.device)

        def run(new: int) -> float:
            session.wait()
            start = time.perf_counter()
            with torch.no_grad():
                session.model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new
                )
            session.wait()
            return 1e3 * (time.perf_counter() - start)

        run(2)
        return (run(tokens) - run(4)) / (tokens - 4)

    return session.measured(("stock generate", requests), measure)


def prefill_ms(session: ServingSession, tokens: int) -> float:
    """A forward over one prompt with a new cache and the logits of its last row; the fastest of three.

    With the kernels of flash-linear-attention on a GPU: from `session.library` in a process of its own, else installed.
    """

    def measure() -> float:
        if session.library is not None:
            words = ["--shape", session.shape, "--device", str(session.device), "--tokens", str(tokens)]
            return printed(__name__, words, "stock", LIMIT, beside(session.library))["prefill_ms"]
        if session.on_gpu:
            _ = session.baselines  # its kernels, where this GPU has to be told that they are right
        ids = torch.tensor(session.prompts(1, tokens), device=session.device)

        def once() -> float:
            session.wait()
            start = time.perf_counter()
            with torch.no_grad():
                session.model(ids, use_cache=True, logits_to_keep=1)
            session.wait()
            return 1e3 * (time.perf_counter() - start)

        try:
            return min(once() for _ in range(3))
        except RuntimeError as error:
            raise NotMeasured(f"transformers' prefill fails: {str(error).splitlines()[0][:120]}") from error

    return session.measured(("stock prefill", tokens), measure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds of transformers' prefill.")
    parser.add_argument("--shape", default="2B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    print(json.dumps({"prefill_ms": prefill_ms(ServingSession(torch.device(given.device), given.shape), given.tokens)}))


if __name__ == "__main__":
    main()
