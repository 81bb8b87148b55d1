"""Where the noisy blocks of training are: the grids over each response, their spans and their views.

Contract: docs/semantics.md section 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...recipe.diffusion import Diffusion
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
    length: Tensor  # noisy positions
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
    begin: Tensor  # its first noisy slot inside the row
    rows: int
    most: int  # blocks of a row
    width: int  # noisy slots of a row

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
        slots = torch.zeros(rows, dtype=torch.int64).index_add_(0, at.row, at.length)
        begin = at.length.cumsum(0) - at.length - (slots.cumsum(0) - slots)[at.row]
        most, width = int(per_row.max()), int(slots.max())
        return Copies(cell, view, at, noise.kinds[cell], index, begin, rows, most, width)

    def spread(self, values: Tensor, fill: int) -> Tensor:
        """Per-copy values [n, ...] on the block axis [rows, blocks, ...]."""
        out = torch.full((self.rows, self.most, *values.shape[1:]), fill, dtype=torch.int64)
        out[self.at.row, self.index] = values
        return out

    def spread_tokens(self, values: Tensor, fill: int) -> Tensor:
        """Values [n, B] int64 of the blocks' positions on the noisy slots [rows, Ln], as many as each block has."""
        out = torch.full((self.rows, self.width), fill, dtype=torch.int64)
        copy, column = (torch.arange(values.shape[1]) < self.at.length[:, None]).nonzero(as_tuple=True)
        out[self.at.row[copy], self.begin[copy] + column] = values[copy, column]
        return out


def lay_grids(
    rows: Sequence[PackedRow],
    diffusion: Diffusion,
    generator: torch.Generator,
    entropies: Sequence[Tensor] | None = None,
) -> Grid:
    """The blocks of every grid of every response; nothing is drawn for grids that start at the first loss token.

    entropies: per row [clean tokens of the row] the entropy of the clean stream's next token, which ends the spans of a
    recipe with `span_entropy`; None: they are as long as they may be, as over a text without any.
    """
    size, drawn = diffusion.block_size, diffusion.grid_offset == "random"
    cells: list[tuple[int, int, int, int, int, int, int]] = []
    for row, packed in enumerate(rows):
        offset = 0
        for index, document in enumerate(packed.documents):
            for start, end in document.responses:
                shift = int(torch.randint(size, (), generator=generator)) if drawn else 0
                for grid in range(diffusion.grids):
                    first = start + (shift + grid * size // diffusion.grids) % size
                    if diffusion.span_entropy:
                        hidden = [0.0] * len(document)
                        if entropies is not None:  # of the token at a position: its predictor is the row before it
                            hidden[1:] = entropies[row][offset : offset + len(document) - 1].tolist()
                        laid = spans(first, end, size, hidden, diffusion.span_entropy)
                    else:
                        laid = [(anchor, size) for anchor in range(first, end, size)]
                    cells += [(row, index, offset, grid, anchor, length, end) for anchor, length in laid]
            offset += len(document)
    columns = torch.tensor(cells, dtype=torch.int64).reshape(-1, 7)
    return Grid(*columns.unbind(1))


def spans(first: int, end: int, longest: int, entropy: Sequence[float], budget: float) -> list[tuple[int, int]]:
    """(anchor, length) of the spans over the positions `first .. end - 1`, one behind the other: each is as long as the
    entropies of its tokens, entropy[position] in nats, add up to at most `budget`, at least 1 and at most `longest`."""
    found = []
    while first < end:
        length, total = 1, entropy[first]
        while length < min(longest, end - first) and total + entropy[first + length] <= budget:
            total += entropy[first + length]
            length += 1
        found.append((first, length))
        first += length
    return found
