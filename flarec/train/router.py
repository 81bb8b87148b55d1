"""Where the routers of expert layers send clean rows and noisy rows, counted apart during training.

A router that treats masked rows as one token sends them all to the same few experts; means over all rows would hide it.
The counts are further outputs of the training graph (pass `count-experts`), made on the device and read with the step's
other metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import STREAMS
from ..passes.count_experts import OUTPUT


@dataclass(frozen=True)
class ExpertLoad:
    """Rows per expert. They add up over micro batches; `summary` reads them once.

    layers  decoder layer of each expert layer
    counts  per expert layer [2, experts] int64: choices by clean rows, by noisy rows (padding counts for neither)
    """

    layers: tuple[int, ...]
    counts: tuple[Tensor, ...]

    @staticmethod
    def of(outputs: Sequence[str], results: Sequence[Tensor]) -> ExpertLoad | None:
        """From the outputs of a training program and their names; None for a model without expert layers."""
        named = zip(outputs, results, strict=True)
        counts = [(int(name.split(".")[1]), counts) for name, counts in named if name.startswith(OUTPUT)]
        return ExpertLoad(*(tuple(column) for column in zip(*counts, strict=True))) if counts else None

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
