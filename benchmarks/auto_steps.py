"""Where the time of `--drafts auto` goes, step by step: kinds of steps, what each cost, kernels, work on the host.

    python benchmarks/auto_steps.py --out benchmarks/results/auto-steps.json --commit $(git rev-parse HEAD)
    python benchmarks/auto_steps.py --shape tiny --device cpu --requests 2 --turns 1     # does it run?

For every number of requests plain causal steps, those of `--drafts auto` held at no drafts, and those that it chooses
over replayed acceptance, in turns so that they meet the same host. Of each: the milliseconds of a step by kind and by
the kind before, those of the host (its choice of blocks, its report), and the kernels of a replay. The limit is on the
time, and the file is written after every part.
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            step()
        session.wait()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profile.events() or []:
        if str(event.device_type).endswith("CUDA"):
            times[event.name[:90]] += event.device_time
            calls[event.name[:90]] += 1
    most = {name: [calls[name] / count, round(us / count, 2)] for name, us in times.most_common(45)}
    return {"kernels": sum(calls.values()) / count, "busy_us": round(sum(times.values()) / count, 1), "by_name": most}


class Watched:
    """Requests that an engine serves: their steps by kind and by the kind before, those that were recorded or run
    apart; and the host's part."""

    def __init__(self, session: ServingSession, engine: Any, requests: int, mode: Any, warm: int) -> None:
        self.session, self.engine = session, engine
        self.policy = engine._policy(None) if mode == "ar-trust" else None
        options = GenerationOptions(mode=mode, drafts="auto", max_new_tokens=1 << 14)
        self.running = [engine.add(prompt, options) for prompt in session.prompts(requests)]
        while any(not request.tokens for request in self.running):
            engine.step()
        for _ in range(warm):
            engine.step()
        self.by_kind: dict[str, list[float]] = defaultdict(list)
        self.host: dict[str, float] = defaultdict(float)
        self.before, self.tokens, self.seconds, self.steps = "", 0, 0.0, 0
        session.wait()

    def take(self, count: int) -> None:
        stats = self.engine.stats
        HOST.seconds.clear()
        self.session.wait()
        for _ in range(count):
            replays, graphs, made = stats.replays, stats.graphs, sum(len(r.tokens) for r in self.running)
            start = time.perf_counter()
            self.engine.step()
            took = time.perf_counter() - start
            drafting = self.policy.drafting if self.policy is not None else CAUSAL
            kind = f"{drafting.size}{'b' if drafting.branches else 's'}" if drafting != CAUSAL else "causal"
            steady = (stats.replays > replays and stats.graphs == graphs) or not stats.graphs
            self.by_kind[f"{self.before or kind} -> {kind}" + ("" if steady else " (not replayed)")].append(1e3 * took)
            self.before = kind
            if steady:
                self.tokens += sum(len(r.tokens) for r in self.running) - made
                self.seconds += took
        self.steps += count
        for name, value in HOST.seconds.items():
            self.host[name] += value

    def found(self) -> dict[str, Any]:
        host = {name: round(1e6 * value / max(1, self.steps), 2) for name, value in self.host.items()}
        return {"tokens_per_s": self.tokens / self.seconds if self.seconds else 0.0, "host_us_per_step": host,
                "by_kind": {name: _spread(values) for name, values in sorted(self.by_kind.items())}}

    def end(self) -> None:
        for request in self.running:
            self.engine.cancel(request)
        self.engine.step()


def of_requests(session: ServingSession, requests: int, turns: int, acceptances: list[float], note: Any) -> None:
    """Turns of 50 steps."""
    plain, auto = session.engine(requests), session.engine(requests, kind=ReplayingEngine)
    assert isinstance(auto, ReplayingEngine)
    auto.share = torch.zeros(1, device=session.device)
    policy = HeldPolicy(choices_of(session.block, "causal"))
    auto.__dict__["_policy"] = lambda key, placed=(): policy
    policy.held = CAUSAL
    both = (Watched(session, plain, requests, "causal", 8), Watched(session, auto, requests, "ar-trust", 8))
    for _ in range(turns):
        for one in both:
            one.take(50)
    for name, one in zip(("causal", "auto held at no drafts"), both, strict=True):
        note(name, one.found())
    for name, one in zip(("causal", "auto held at no drafts"), both, strict=True):
        note(f"{name}, kernels", _kernels(session, one.engine.step))
        one.end()
    policy.held = None
    for tokens in acceptances:
        auto.share.fill_(share_of(tokens, session.block))
        both = (Watched(session, plain, requests, "causal", 8), Watched(session, auto, requests, "ar-trust", 100))
        for _ in range(2 * turns):
            for one in both:
                one.take(50)
        rates = [one.found()["tokens_per_s"] for one in both]
        note(f"auto at {tokens:g}", {"ratio": rates[1] / rates[0], **both[1].found()})
        note(f"auto at {tokens:g}, causal in turn", both[0].found())
        known = {f"{key[0]} {key[1].size}{'b' if key[1].branches else 's'}": [round(1e3 * value.cost, 4), value.count]
                 for key, value in policy._timings.items()}
        note(f"auto at {tokens:g}, believed", {"ms": known, "purse": policy.purse, "acceptance": [
            round(policy.acceptance(depth), 3) for depth in range(1, session.block + 1)]})
        for one in both:
            one.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64, 8])
    parser.add_argument("--acceptance", type=float, nargs="+", default=[1.0, 1.5])
    parser.add_argument("--turns", type=int, default=4, help="of 50 steps each")
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
            of_requests(session, requests, options.turns, options.acceptance, note)
        except Exception:
            failed = 1
            traceback.print_exc()
        session.clock.free()
    return failed


if __name__ == "__main__":
    sys.exit(main())
