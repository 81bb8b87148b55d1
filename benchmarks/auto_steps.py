"""Where the time of `--drafts auto` goes, step by step: kinds of steps, what each cost, kernels, work on the host.

    python benchmarks/auto_steps.py --out benchmarks/results/auto-steps.json --commit $(git rev-parse HEAD)
    python benchmarks/auto_steps.py --shape tiny --device cpu --requests 2 --steps 40     # does it run?

For every number of requests: plain causal steps, then those of `--drafts auto` held at no drafts, then as it chooses
them over replayed acceptance. Of each: the milliseconds of a step, those of the host (its choice of blocks, its
report), and the kernels of a replay. The limit is on the time, and the file is written after every part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from flarec.base.generation import GenerationOptions
from flarec.bench.report import device_text, versions
from flarec.bench.serving.models import ServingSession
from flarec.bench.serving.ours import ReplayingEngine, share_of
from flarec.decode.modes.ar_trust import ARTrustMode
from flarec.decode.policy import CAUSAL, Drafting, DraftPolicy, choices_of
from flarec.decode.rows import Rows


class HeldPolicy(DraftPolicy):
    """Chooses what it is told to, if it is told anything."""

    held: Drafting | None = None

    def next(self, rows: int) -> Drafting:
        chosen = super().next(rows)
        if self.held is None:
            return chosen
        self.drafting = self.held
        return self.held


class HostClock:
    """Seconds that the host spends in some methods while it runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(*given, **named)
            finally:
                self.seconds[f"{owner.__name__}.{name}"] += time.perf_counter() - start

        setattr(owner, name, timed)


HOST = HostClock()


def _spread(values: list[float]) -> dict[str, float]:
    found = {"steps": float(len(values)), "median_ms": statistics.median(values), "mean_ms": statistics.fmean(values),
             "total_ms": sum(values)}
    return {name: round(value, 4) for name, value in found.items()}


def _kernels(session: ServingSession, step: Any, count: int = 4) -> dict[str, Any]:
    """Of a step: how many kernels and copies, how long they are busy, and the longest by name (microseconds)."""
    if not session.on_gpu:
        return {}
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            step()
        session.wait()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profile.events() or []:
        if event.device_type == DeviceType.CUDA:
            times[event.name[:90]] += event.device_time
            calls[event.name[:90]] += 1
    most = {name: [calls[name] / count, round(us / count, 2)] for name, us in times.most_common(45)}
    return {"kernels": sum(calls.values()) / count, "busy_us": round(sum(times.values()) / count, 1), "by_name": most}


def _steps(engine: Any, running: list[Any], count: int) -> dict[str, Any]:
    """Steps by kind and by the kind before, those that were recorded or run apart; and the host's part."""
    policy = engine.__dict__.get("_policy")
    by_kind: dict[str, list[float]] = defaultdict(list)
    before, tokens, seconds, stats = "", 0, 0.0, engine.stats
    HOST.seconds.clear()
    for _ in range(count):
        replays, graphs, made = stats.replays, stats.graphs, sum(len(r.tokens) for r in running)
        start = time.perf_counter()
        engine.step()
        took = time.perf_counter() - start
        drafting = policy.drafting if policy is not None else CAUSAL
        kind = f"{drafting.size}{'b' if drafting.branches else 's'}" if drafting != CAUSAL else "causal"
        steady = (stats.replays > replays and stats.graphs == graphs) or not stats.graphs
        by_kind[f"{before or kind} -> {kind}" + ("" if steady else " (not replayed)")].append(1e3 * took)
        before = kind
        if steady:
            tokens, seconds = tokens + sum(len(r.tokens) for r in running) - made, seconds + took
    host = {name: round(1e6 * value / count, 2) for name, value in HOST.seconds.items()}
    return {"tokens_per_s": tokens / seconds if seconds else 0.0, "host_us_per_step": host,
            "by_kind": {name: _spread(values) for name, values in sorted(by_kind.items())}}


def _begin(engine: Any, session: ServingSession, requests: int, options: GenerationOptions, warm: int) -> list[Any]:
    running = [engine.add(prompt, options) for prompt in session.prompts(requests)]
    while any(not request.tokens for request in running):
        engine.step()
    for _ in range(warm):
        engine.step()
    session.wait()
    return running


def _end(engine: Any, running: list[Any]) -> None:
    for request in running:
        engine.cancel(request)
    engine.step()


def of_requests(session: ServingSession, requests: int, steps: int, acceptances: list[float], note: Any) -> None:
    causal, auto = (GenerationOptions(mode="causal", max_new_tokens=1 << 14),
                    GenerationOptions(mode="ar-trust", drafts="auto", max_new_tokens=1 << 14))
    engine = session.engine(requests)
    running = _begin(engine, session, requests, causal, 8)
    note("causal", _steps(engine, running, steps))
    note("causal, kernels", _kernels(session, engine.step))
    _end(engine, running)
    del engine
    engine = session.engine(requests, kind=ReplayingEngine)
    engine.share = torch.zeros(1, device=session.device)
    policy = engine.__dict__["_policy"] = HeldPolicy(choices_of(session.block, "causal"))
    policy.held = CAUSAL
    running = _begin(engine, session, requests, auto, 8)
    note("auto held at no drafts", _steps(engine, running, steps))
    note("auto held at no drafts, kernels", _kernels(session, engine.step))
    _end(engine, running)
    policy.held = None
    for tokens in acceptances:
        engine.share.fill_(share_of(tokens, session.block))
        running = _begin(engine, session, requests, auto, 100)
        note(f"auto at {tokens:g}", _steps(engine, running, 2 * steps))
        known = {str(key): [round(1e3 * value[0], 4), value[1]] for key, value in policy._costs.items()}
        note(f"auto at {tokens:g}, believed", {"ms": known, "acceptance": [
            round(policy.acceptance(depth), 3) for depth in range(1, session.block + 1)]})
        _end(engine, running)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64, 8])
    parser.add_argument("--acceptance", type=float, nargs="+", default=[1.0, 1.5])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--uncompiled", action="store_true", help="do not compile steps by region")
    parser.add_argument("--time-limit", type=float, default=110.0, help="begin no other number after so many seconds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args()
    begun = time.perf_counter()
    device = torch.device(options.device)
    session = ServingSession(
        device, options.shape, compile=device.type == "cuda" and not options.uncompiled,
        context=512 if device.type == "cuda" else 16,
    )
    name = device_text(device)
    found: dict[str, Any] = {"device": name, "versions": versions(), "commit": options.commit,
                             "command": " ".join(["python", *sys.argv]), "requests": {}}
    HOST.watch(ARTrustMode, "shape")
    HOST.watch(Rows, "_report")
    failed = 0
    for requests in options.requests:
        if time.perf_counter() - begun > options.time_limit:
            print(f"C = {requests}: left out, for lack of time", flush=True)
            continue
        parts: dict[str, Any] = {}
        found["requests"][str(requests)] = parts

        def note(part: str, value: dict[str, Any], parts: dict[str, Any] = parts, requests: int = requests) -> None:
            parts[part] = value
            shown = {key: one for key, one in value.items() if key != "by_name"}
            print(f"C = {requests}, {part} ({time.perf_counter() - begun:.0f} s): {json.dumps(shown)}", flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(found, indent=1) + "\n")

        try:
            of_requests(session, requests, options.steps, options.acceptance, note)
        except Exception:
            failed = 1
            traceback.print_exc()
        session.clock.free()
    return failed


if __name__ == "__main__":
    sys.exit(main())
