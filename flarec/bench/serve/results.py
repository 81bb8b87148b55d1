"""Numbers of a run: what all requests of one load gave."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .load import Answered


@dataclass(frozen=True)
class LoadResult:
    """One load.

    name                  of the setting: causal, ar-trust, ...
    load                  clients (closed loop) or requests per second (open loop)
    tokens_per_second     new tokens of all requests by the time from the first request to the last answer
    first_token_ms        from a request to its first text: median and 99th percentile
    token_ms              time per token behind the first text, the median over requests
    tokens_per_forward    of the server's counters, None for a server that has none
    accepted              drafts accepted by position, as a part of those verified there
    errors                requests without an answer
    """

    name: str
    kind: str
    load: float
    requests: int
    errors: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_token_ms: tuple[float, float]
    token_ms: float
    tokens_per_forward: float | None = None
    accepted: tuple[float, ...] = ()

    def text(self) -> str:
        """One line for the terminal."""
        unit = "clients" if self.kind == "closed" else "requests/s"
        more = f", {self.tokens_per_forward:.2f} tokens per forward" if self.tokens_per_forward is not None else ""
        errors = f", {self.errors} OF {self.requests} REQUESTS FAILED" if self.errors else ""
        return (
            f"{self.name:<16} {self.load:>6g} {unit}: {self.tokens_per_second:8.1f} tokens/s, first token "
            f"{self.first_token_ms[0]:.0f} ms (99 %: {self.first_token_ms[1]:.0f}), {self.token_ms:.1f} ms per token"
            f"{more}{errors}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def result(
    name: str, kind: str, load: float, answers: Sequence[Answered], seconds: float,
    before: Mapping[str, float], after: Mapping[str, float],
) -> LoadResult:
    """Of what was answered, and of the server's counters before and after."""
    right = [answer for answer in answers if answer.error is None]
    first = sorted(answer.arrivals[0] for answer in right if answer.arrivals)
    later = [
        (answer.seconds - answer.arrivals[0]) / (answer.tokens - 1)
        for answer in right if answer.arrivals and answer.tokens > 1
    ]
    tokens = sum(answer.tokens for answer in right)
    forwards = _added("flarec_generation_forwards_total", before, after)
    counted = _added("flarec_generation_tokens_total", before, after)
    return LoadResult(
        name=name, kind=kind, load=load, requests=len(answers), errors=len(answers) - len(right), tokens=tokens,
        seconds=seconds, tokens_per_second=tokens / seconds if seconds else 0.0,
        first_token_ms=(1e3 * _quantile(first, 0.5), 1e3 * _quantile(first, 0.99)),
        token_ms=1e3 * statistics.median(later) if later else 0.0,
        tokens_per_forward=counted / forwards if forwards else None,
        accepted=tuple(_accepted(before, after)),
    )


def record(results: Sequence[LoadResult], *, url: str, command: str, commit: str | None) -> str:
    """The JSON file."""
    table = {
        "url": url, "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with the server if it is local",
        "command": command, "commit": commit, "rows": [item.to_dict() for item in results],
    }
    return json.dumps(table, indent=1) + "\n"


def counters(text: str) -> dict[str, float]:
    """The samples of Prometheus' text format by name and labels. Lines that are none are passed over."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#"):
            try:
                found[name] = float(value)
            except ValueError:
                continue
    return found


def _added(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


def _accepted(before: Mapping[str, float], after: Mapping[str, float]) -> list[float]:
    parts: list[float] = []
    while drafted := _added(f'flarec_drafted_tokens_total{{position="{len(parts) + 1}"}}', before, after):
        parts.append(_added(f'flarec_accepted_tokens_total{{position="{len(parts) + 1}"}}', before, after) / drafted)
    return parts


def _quantile(values: Sequence[float], part: float) -> float:
    """Of sorted values, the nearest rank; 0 of none."""
    return values[min(len(values) - 1, int(part * len(values)))] if values else 0.0
