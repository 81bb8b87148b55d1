"""Where the routers of expert layers send clean rows and noisy rows, counted apart during training.

A router that treats masked rows as one token sends them all to the same few experts; means over all rows would hide it.
The counts are made on the device from the expert choices, as further outputs of the training graph, and read with the
step's other metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ir.program import Program, layer_of
from ..layout import PADDING, Layout

STREAMS = ("clean", "noisy")
_PADDED = len(STREAMS)


@dataclass(frozen=True)
class ExpertLoad:
    """Rows per expert. They add up over micro batches; `summary` reads them once.

    layers  decoder layer of each expert layer
    counts  per expert layer [2, experts] int64: choices by clean rows, by noisy rows (padding counts for neither)
    """

    layers: tuple[int, ...]
    counts: tuple[Tensor, ...]

    def __add__(self, other: ExpertLoad) -> ExpertLoad:
        return ExpertLoad(self.layers, tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    def summary(self) -> dict[str, Any]:
        """Plain numbers (a host sync): `layers`, and per stream lists with an entry per expert layer.

        max_over_mean  choices of the busiest expert over the mean: 1 is even, the number of experts is one for all
        entropy        of the choices, over that of even ones: 1 is even, 0 is one for all
        Both are None where a stream has no rows.
        """
        flat = torch.cat([layer.flatten() for layer in self.counts]).tolist()  # one transfer
        values: dict[str, Any] = {"layers": list(self.layers)}
        for name in STREAMS:
            values[name] = {"max_over_mean": [], "entropy": []}
        start = 0
        for layer in self.counts:
            experts = layer.shape[1]
            for name in STREAMS:
                busiest, entropy = _balance(flat[start : start + experts])
                values[name]["max_over_mean"].append(busiest)
                values[name]["entropy"].append(entropy)
                start += experts
        return values


def _balance(counts: Sequence[int]) -> tuple[float | None, float | None]:
    total, experts = sum(counts), len(counts)
    if not total:
        return None, None
    entropy = -sum(count / total * math.log(count / total) for count in counts if count)
    return max(counts) * experts / total, entropy / math.log(experts) if experts > 1 else 1.0


def worst(summary: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Per stream the least even layer of a summary."""
    return {
        name: {
            "max_over_mean": max((v for v in summary[name]["max_over_mean"] if v is not None), default=None),
            "entropy": min((v for v in summary[name]["entropy"] if v is not None), default=None),
        }
        for name in STREAMS
    }


def describe(summary: Mapping[str, Any]) -> str:
    """For a line of progress: the busiest expert of the least even layer, by stream."""
    values = worst(summary)
    texts = [f"{name} {v['max_over_mean']:.1f}x" for name, v in values.items() if v["max_over_mean"] is not None]
    return f"busiest expert {', '.join(texts)} the mean"


class RouterProbe:
    """Runs a lowered training program; with expert layers it also returns their load."""

    def __init__(self, program: Program) -> None:
        self.program = program.clone()
        self.nodes = [node for node, mixer in ops.sites(self.program.graph) if mixer is ops.MOE_EXPERTS]
        self.experts = [ops.site_of(node).size("up", 0) for node in self.nodes]
        self.layers = tuple(layer if (layer := layer_of(node)) is not None else -1 for node in self.nodes)
        if self.nodes:
            chosen = [(f"experts_{number}", node.kwargs["index"]) for number, node in enumerate(self.nodes)]
            self.program.add_outputs(chosen)  # type: ignore[arg-type]
            self.program.finish()

    def __call__(
        self, input_ids: Tensor, layout: Layout, head_rows: Tensor, derived: Mapping[str, Any]
    ) -> tuple[Tensor, ExpertLoad | None]:
        """Logits [N, V] of the head rows, and the load of the expert layers; None if there are none."""
        given = {"input_ids": input_ids, "layout": layout, "head_rows": head_rows, **derived}
        logits, *chosen = self.program.module(*[given[node.name] for node in self.program.placeholders()])
        if not chosen:
            return logits, None
        stream = streams(layout)
        return logits, ExpertLoad(
            self.layers,
            tuple(count_choices(index, stream, experts) for index, experts in zip(chosen, self.experts, strict=True)),
        )


def streams(layout: Layout) -> Tensor:
    """[rows * T] int64: 0 for a clean token, 1 for a noisy one, 2 for padding."""
    clean = torch.where(layout.clean_document != PADDING, 0, _PADDED)
    noisy = torch.where(layout.noisy_block != PADDING, 1, _PADDED)
    return torch.cat([clean, noisy], dim=1).flatten()


@torch.no_grad()
def count_choices(index: Tensor, stream: Tensor, experts: int) -> Tensor:
    """[2, experts] from the choices index [rows * T, k]; a choice that the router drops has the index `experts`."""
    index = index.reshape(len(stream), -1).long()
    cells = (stream[:, None] * (experts + 1) + index).flatten()
    counts = cells.new_zeros((_PADDED + 1) * (experts + 1)).scatter_add_(0, cells, torch.ones_like(cells))
    return counts.reshape(_PADDED + 1, experts + 1)[:_PADDED, :experts]
