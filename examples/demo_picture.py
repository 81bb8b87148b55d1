"""The demo's picture: accuracy and tokens per forward of every mode, and the conversion's losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

NAMES = ("source", "causal", "ar-trust", "diffusion-trust")
COLOURS = ("#7f7f7f", "#4c72b0", "#55a868", "#dd8452")


def draw(report: dict[str, Any], metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG of three panels to `path`."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4))
    for axes, key, title, form in (
        (left, "accuracy", "accuracy on held-out tasks", "{:.1%}"),
        (middle, "tokens_per_forward", "tokens per forward pass", "{:.2f}"),
    ):
        names = [name for name in NAMES if name in report]
        bars = axes.bar(names, [report[name][key] for name in names], color=COLOURS[: len(names)])
        axes.bar_label(bars, [form.format(report[name][key]) for name in names])
        axes.set_title(title)
        axes.tick_params(axis="x", rotation=15)
        axes.spines[["top", "right"]].set_visible(False)
    steps = [row for row in metrics if "diffusion_loss" in row]
    kinds = dict.fromkeys("+".join(row["diffusion_losses"]) for row in steps)
    noisy = f"diffusion ({', then '.join(kinds)})"
    losses = (("ar_loss", "AR (clean stream)", COLOURS[1]), ("diffusion_loss", noisy, COLOURS[3]))
    for key, label, colour in losses:
        right.plot([row["step"] for row in steps], [row[key] for row in steps], label=label, color=colour)
    right.set_yscale("symlog", linthresh=0.01)  # el is minus the expected accepted length
    right.set_xlabel("optimizer step")
    right.set_title("losses of the conversion")
    right.legend(frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
