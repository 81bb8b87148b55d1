"""The pictures of the README: time of forward and backward against block size, our kernel and routes without one; of
decoding, `rates`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.files import check_apart
from ..errors import UsageError
from .figures import Points, write_figure
from .rates import draw_rates, is_decoding, rates
from .rows import BLOCKS, PLOTTED, ROUTE_BLOCKS, ROWS

KINDS = "`flarec bench kernels` or `flarec bench decode`"
"""What is drawn."""


def read(path: Path) -> dict[str, Any]:
    """The rows of a results file by name. Raises `UsageError` for anything else."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {row["name"]: row for row in rows}
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give what {KINDS} wrote") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} holds no results of {KINDS}; run it with --out") from None


def curves(rows: Mapping[str, Any]) -> dict[str, Points]:
    """Measured milliseconds by block size, for every curve with at least one point."""

    def points(pattern: str, blocks: tuple[int, ...], value: str | None = None) -> Points:
        found = [(block, rows.get(pattern.format(block))) for block in blocks]
        return [
            (block, float(row["values"][value] if value else row["value"]))
            for block, row in found
            if row is not None and row["status"] == "measured"
        ]

    two_views = points("linear-block-{}", BLOCKS, "ours_ms")
    train = rows.get("linear-train")
    if train is not None and train["status"] == "measured":
        two_views = sorted([*two_views, (4, float(train["values"]["ours_ms"]))])
    named = {
        "flarec, two views": two_views,
        "flarec, one view": points("one-view-block-{}", PLOTTED),
        "library calls, virtual queries, one view": points("virtual-queries-block-{}", ROUTE_BLOCKS["virtual queries"]),
        "library calls, stored states, one view": points("simple-block-{}", ROUTE_BLOCKS["simple"]),
    }
    return {name: found for name, found in named.items() if found}


def _why_nothing(rows: Mapping[str, Any]) -> str:
    """Why a file with these rows has no picture."""
    if is_decoding(rows):
        return "has no measured steps to draw; run `flarec bench decode` with its rows ar-trust-step"
    other = next((name for name in rows if name not in {row.name for row in ROWS}), None)
    if other is None:
        return "has no measured block sizes to draw; run `flarec bench kernels` on a GPU"
    return (
        f"holds rows that have no picture ({other}); give what {KINDS} wrote (loads of a server are drawn by `flarec "
        "bench serve --plot`)"
    )


def draw(results: Path, out: Path) -> None:
    """Draw the picture of a results file; the suffix of `out` chooses one of the formats of matplotlib.

    Raises `UsageError` for a file without results, and for one that is no place for the picture.
    """
    check_apart([out], [results])
    rows = read(results)
    if is_decoding(rows) and rates(rows):
        draw_rates(rows, out)
        return
    found = curves(rows)
    if not found:
        raise UsageError(f"{results} {_why_nothing(rows)}")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for (name, points), style in zip(found.items(), ("o-", "s-", "^--", "v--"), strict=False):
            axes.plot([block for block, _ in points], [ms for _, ms in points], style, label=name)
        for row, name in (("linear-train", "clean stream alone"), ("linear-plain", "three clean streams")):
            if row in rows and rows[row]["status"] == "measured":
                height = rows[row]["values"]["baseline_ms"]
                axes.axhline(height, color="grey", linewidth=1, linestyle=":")
                axes.annotate(f"{name} (flash-linear-attention)", (1, height), color="grey", va="bottom", fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({block for points in found.values() for block, _ in points})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("block size")
        axes.set_ylabel("forward + backward, ms")
        axes.legend(frameon=False)
        write_figure(figure, out)
