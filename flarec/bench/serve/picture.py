"""The figure of `flarec bench serve`: tokens per second and time to the first token against the load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..figures import write_figure
from .results import LoadResult

UNITS = {"closed": "clients", "open": "requests per second"}


def draw_loads(results: Sequence[LoadResult], out: Path) -> None:
    """A row of two panels per kind of load; the suffix of `out` chooses the format. Raises `UsageError`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kinds = [kind for kind in UNITS if any(item.kind == kind for item in results)]
    with rc_context({"font.size": 10}):
        figure = Figure(figsize=(9, 3.6 * len(kinds)), layout="constrained")
        for row, kind in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds, strict=True):
            for name in dict.fromkeys(item.name for item in results):
                points = sorted((item for item in results if (item.kind, item.name) == (kind, name)),
                                key=lambda item: item.load)
                loads = [item.load for item in points]
                row[0].plot(loads, [item.tokens_per_second for item in points], "o-", label=name)
                row[1].plot(loads, [item.first_token_ms[0] for item in points], "o-", label=name)
            for axes, title in zip(row, ("tokens per second", "time to the first token, ms (median)"), strict=True):
                axes.set_xscale("log", base=2)
                axes.set_xlabel(UNITS[kind])
                axes.set_ylabel(title)
                axes.set_ylim(bottom=0)
                axes.legend(frameon=False)
        write_figure(figure, out)
