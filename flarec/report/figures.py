"""Plots as SVG that stands in a page: its text and lines have the page's colours, light or dark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

Points = Sequence[tuple[float, float]]
INK, GRID = "#010203", "#040506"
"""Colours that stand for those of the page, `currentColor` and `--grid`."""
SERIES = tuple(f"#0708{number:02x}" for number in range(8))
"""Stand for `--series-0` to `--series-7`."""
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
"""Line and marker of the first eight series, of the next eight, and so on: colours are used again."""
MOST_POINTS = 600
MARKED = 40
"""Curves of up to so many points show each of them."""
WIDTH, HEIGHT, ROW = 6.4, 3.2, 0.17
"""Inches: of a figure, and of a row of its legend, which stands below."""
LONGEST = 80
"""Letters of a name in a legend; the table of numbers has all."""


@dataclass(frozen=True)
class Figure:
    """Named series of points. intervals: series -> (low, high) of each of its points; joined: by lines."""

    title: str
    x: str
    y: str
    series: Mapping[str, Points]
    intervals: Mapping[str, Sequence[tuple[float, float]]]
    joined: bool = True

    def svg(self) -> str:
        """An `<svg>` element without ids that another figure could have, styles, scripts and addresses."""
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Canvas
        from matplotlib.ticker import MaxNLocator

        settings: Any = {
            "svg.fonttype": "none", "svg.hashsalt": self.title, "font.family": "sans-serif", "font.size": 10,
            "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
            "grid.color": GRID, "text.parse_math": False,
        }
        with rc_context(settings):
            names = [_shown(name) for name in self.series] if len(self.series) > 1 else []
            # a letter takes 0.08 inches at most times, its line 0.6
            columns = max(1, int(0.9 * WIDTH / (0.6 + 0.08 * max(map(len, names), default=0))))
            legend = ROW * -(-len(names) // columns)
            height = HEIGHT + legend
            canvas = Canvas(figsize=(WIDTH, height))
            canvas.subplots_adjust(left=0.11, right=0.98, bottom=(0.5 + legend) / height, top=1 - 0.13 / height)
            axes = canvas.add_subplot()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(True, linewidth=0.6)
            axes.set_xlabel(self.x)
            axes.set_ylabel(self.y)
            curves = [
                self._draw(axes, name, thinned(points), number)
                for number, (name, points) in enumerate(self.series.items())
            ]
            if self.x == "step":
                axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
            if names:
                canvas.legend(
                    curves, names, loc="lower left", bbox_to_anchor=(0.09, 0), ncols=columns, frameon=False, fontsize=9,
                    borderaxespad=0, labelspacing=0.3, handlelength=2.5,
                )
            out = StringIO()
            canvas.savefig(out, format="svg", transparent=True)
        return _in_a_page(out.getvalue(), self.title)

    def _draw(self, axes: Any, name: str, points: Points, number: int) -> Any:
        """The curve of series `number`, for the legend."""
        x, y = [point[0] for point in points], [point[1] for point in points]
        colour, (style, mark) = SERIES[number % len(SERIES)], STYLES[number // len(SERIES) % len(STYLES)]
        (curve,) = axes.plot(
            x, y, linestyle=style if self.joined else "none",
            marker=mark if len(points) <= MARKED or not self.joined else "", markersize=4, linewidth=1.4, color=colour,
        )
        for place, (low, high) in zip(x, self.intervals.get(name, ()), strict=False):
            axes.plot([place, place], [low, high], linewidth=1.2, color=colour)
        return curve


def _shown(name: str) -> str:
    """As it stands in a legend: matplotlib leaves out what begins with a line."""
    short = name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
    return f" {short}" if short.startswith("_") else short


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Every n-th point so that at most `most` are left, the last one among them."""
    stride = -(-(len(points) - 1) // (most - 1))
    return points if stride <= 1 else [*points[: -1 : stride], points[-1]]


def _in_a_page(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_[0-9]+"', "", svg)  # names that every figure has; the others are hashes
    svg = re.sub(r' width="[0-9.]+pt"| height="[0-9.]+pt"', "", svg, count=2)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for number, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--series-{number})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
