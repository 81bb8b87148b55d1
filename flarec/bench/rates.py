"""The picture of decoding: tokens per second against the number of requests that step together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .figures import Points, write_figure

STEP, RATE = "ar-trust-step-", "ar-trust-rate-"
DECODING = (
    STEP, RATE, "causal-step-", "diffusion-trust-step-", "stock-generate-", "sampling-", "long-context", "prefill",
    "engine-prefill", "first-token-", "waits", "drafts-auto-",
)
"""How names of rows of `flarec bench decode` begin."""


def is_decoding(rows: Mapping[str, Any]) -> bool:
    """Whether these rows are of `flarec bench decode`."""
    return any(name.startswith(DECODING) for name in rows)


def rates(rows: Mapping[str, Any]) -> dict[str, Points]:
    """Measured tokens per second by requests, for every curve with at least one point.

    AR-Trust's are at the tokens per forward that its rows of rates assume.
    """
    values = {name: row["values"] for name, row in rows.items() if row["status"] == "measured"}
    found: dict[str, dict[int, float]] = {"AR-Trust": {}, "causal": {}, "transformers, static cache, CUDA graph": {}}
    trusted, causal, stock = found.values()
    for name, own in values.items():
        number = name.rpartition("-")[2]
        if not number.isdigit():
            continue
        requests = int(number)
        if name.startswith(STEP):
            causal[requests] = 1e3 * requests / own["causal_ms"]
        elif name.startswith(RATE):
            trusted[requests], stock[requests] = own["tokens_per_s"], own["stock_graph_tokens_per_s"]
        elif name.startswith("causal-step-") and "stock_graph_ms" in own:
            causal.setdefault(requests, 1e3 * requests / own["ours_ms"])
            stock.setdefault(requests, 1e3 * requests / own["stock_graph_ms"])
    return {name: sorted(points.items()) for name, points in found.items() if points}


def draw_rates(rows: Mapping[str, Any], out: Path) -> None:
    """Draw the rows of `flarec bench decode`; the suffix of `out` chooses the format. Raises `UsageError`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = rates(rows)
    with rc_context({"font.size": 10}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for (name, points), style in zip(found.items(), ("o-", "s-", "^--"), strict=False):
            axes.plot([requests for requests, _ in points], [rate for _, rate in points], style, label=name)
            for requests, rate in points:
                axes.annotate(f"{rate:,.0f}", (requests, rate), textcoords="offset points", xytext=(0, 6), fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({requests for points in found.values() for requests, _ in points})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("requests")
        axes.set_ylabel("tokens per second")
        axes.margins(y=0.12)
        axes.legend(frameon=False)
        write_figure(figure, out)
