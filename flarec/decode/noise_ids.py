"""Random ids as noise: what a masked position shows where there is no mask token (docs/semantics.md section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.kernels.sampling import random_ids

Ranges = Sequence[tuple[int, int]]


def pool_of(ranges: Ranges, device: torch.device | str = "cpu") -> Tensor:
    """The ids [P] int64 of ranges [first, end)."""
    return torch.cat([torch.arange(first, end) for first, end in ranges]).to(device)


@dataclass(frozen=True, eq=False)
class NoiseIds:
    """Draws from a pool of ids [P] int64, by request and position."""

    pool: Tensor

    def draw(self, seed: Tensor, position: Tensor) -> Tensor:
        """seed [rows], position [rows, n] in the document, int64 -> ids [rows, n] int64."""
        return random_ids(seed, position, self.pool)
