"""The ladder as one picture: what each arm costs and gives, with its interval over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.ladder.arms import BLOCK, BLOCKS, MAIN
from benchmarks.ladder.measure import THRESHOLDS


def draw(summary: dict[str, Any], out: Path) -> None:
    """Write a figure of four panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    names = [name for name, *_ in MAIN if name in summary["arms"]]
    _bars(panels[0][0], summary, names, ["AR loss change"], "nats per token of held-out text")
    both = ["tokens per forward, T=0", "tokens per forward, T=1"]
    _bars(panels[0][1], summary, names, both, "tokens per forward, AR-Trust")
    for name in names:
        arm, starts = summary["arms"][name], [f"Diffusion-Trust at {at}" for at in THRESHOLDS]
        points = [
            (arm[f"{start}, tokens per forward"]["mean"], arm[f"{start}, accuracy"]["mean"])
            for start in starts if f"{start}, accuracy" in arm
        ]
        if points:
            panels[1][0].plot(*zip(*points, strict=True), marker="o", label=name)
    panels[1][0].set(xlabel="tokens per forward", ylabel="accuracy, tasks", title="Diffusion-Trust by threshold")
    if panels[1][0].lines:
        panels[1][0].legend(fontsize=7)
    for recipe in ("flare", "draft"):
        for kind in ("T=0", "T=1"):
            sizes = [(size, recipe if size == BLOCK else f"{recipe}-block-{size}") for size in sorted((*BLOCKS, BLOCK))]
            points = [
                (size, summary["arms"][arm][f"tokens per forward, {kind}"])
                for size, arm in sizes if arm in summary["arms"]
            ]
            if points:
                errors = [_half(value) for _, value in points]
                panels[1][1].errorbar(
                    [size for size, _ in points], [value["mean"] for _, value in points], yerr=errors, marker="o",
                    capsize=3, label=f"{recipe}, {kind}",
                )
    panels[1][1].set(xscale="log", xlabel="block size", ylabel="tokens per forward", title="AR-Trust by block size")
    panels[1][1].set_xticks(sorted((*BLOCKS, BLOCK)), [str(size) for size in sorted((*BLOCKS, BLOCK))])
    if panels[1][1].lines:
        panels[1][1].legend(fontsize=7)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _bars(panel: Any, summary: dict[str, Any], names: list[str], values: list[str], title: str) -> None:
    for number, value in enumerate(values):
        arms = [summary["arms"][name] for name in names]
        rows = [(place, arm[value]) for place, arm in enumerate(arms) if value in arm]
        if not rows:
            continue
        panel.errorbar(
            [place + 0.2 * number for place, _ in rows], [row["mean"] for _, row in rows],
            yerr=[_half(row) for _, row in rows], fmt="o", capsize=3, label=value,
        )
    panel.set_title(title)
    panel.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    panel.grid(axis="y", alpha=0.3)
    if len(values) > 1:
        panel.legend(fontsize=8)


def _half(row: dict[str, Any]) -> float:
    return 0.0 if row["interval"] is None else row["interval"][1] - row["mean"]
