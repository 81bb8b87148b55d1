"""Where the noisy blocks of training are: the grids over each response, and their views.

Contract: docs/semantics.md section 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...recipe.sections import Diffusion
from ..data.document import PackedRow
from .kinds import Kinds
from .noise import Noise


@dataclass(frozen=True)
class Grid:
    """The blocks of all grids before noise, all [n] int64: where they are, and what their response allows."""

    row: Tensor
    document: Tensor
    offset: Tensor  # clean slot of the document's first token
    grid: Tensor  # number of the grid over its response
    anchor: Tensor
    end: Tensor  # document position after the response

    def select(self, keep: Tensor) -> Grid:
        return Grid(*(getattr(self, item.name)[keep] for item in fields(self)))


@dataclass(frozen=True)
class Copies:
    """The noisy blocks: each block of a grid once per view, ordered by row, grid, view and position; tensors [n] int64.
    """

    cell: Tensor  # the block of the grid
    view: Tensor
    at: Grid  # where the block is
    kinds: Kinds
    index: Tensor  # block index inside the row
    rows: int
    most: int  # blocks of a row

    @staticmethod
    def of(grid: Grid, noise: Noise, rows: int) -> Copies:
        views = noise.kinds.views
        cell = torch.cat([torch.arange(len(views)), (views == 2).nonzero().squeeze(1)])
        view = (torch.arange(len(cell)) >= len(views)).long()
        grids = int(grid.grid.max()) + 1 if len(grid.grid) else 1
        order = ((grid.row[cell] * grids + grid.grid[cell]) * 2 + view).argsort(stable=True)
        cell, view = cell[order], view[order]
        at = grid.select(cell)
        per_row = torch.bincount(at.row, minlength=rows)
        index = torch.arange(len(cell)) - (per_row.cumsum(0) - per_row)[at.row]
        return Copies(cell, view, at, noise.kinds[cell], index, rows, int(per_row.max()))

    def spread(self, values: Tensor, fill: int) -> Tensor:
        """Per-copy values [n, ...] on the block axis [rows, blocks, ...]."""
        out = torch.full((self.rows, self.most, *values.shape[1:]), fill, dtype=torch.int64)
        out[self.at.row, self.index] = values
        return out


def lay_grids(rows: Sequence[PackedRow], diffusion: Diffusion, generator: torch.Generator) -> Grid:
    """The blocks of every grid of every response; nothing is drawn for grids that start at the first loss token."""
    size, drawn = diffusion.block_size, diffusion.grid_offset == "random"
    cells: list[tuple[int, int, int, int, int, int]] = []
    for row, packed in enumerate(rows):
        offset = 0
        for index, document in enumerate(packed.documents):
            for start, end in document.responses:
                shift = int(torch.randint(size, (), generator=generator)) if drawn else 0
                for grid in range(diffusion.grids):
                    first = start + (shift + grid * size // diffusion.grids) % size
                    cells += [(row, index, offset, grid, anchor, end) for anchor in range(first, end, size)]
            offset += len(document)
    columns = torch.tensor(cells, dtype=torch.int64).reshape(-1, 6)
    return Grid(*columns.unbind(1))
