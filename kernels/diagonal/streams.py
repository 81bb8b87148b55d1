"""Between the token-major tensors of a model and the time-first chunks and panels of a scan schedule."""

from __future__ import annotations

from torch import Tensor

from .schedule import Panel, ScanSchedule


class Streams:
    """Operands [B, T, D] of one layout as time-first tokens of chunks and panels, and the way back."""

    def __init__(self, parts: tuple[Tensor, ...], schedule: ScanSchedule) -> None:
        self.schedule = schedule
        clean = schedule.clean_length
        self._clean = [part[:, :clean].transpose(0, 1) for part in parts]
        if schedule.clean_padded:
            padding = schedule.padding.t()[..., None]
            self._clean = [part.masked_fill(padding, 0) for part in self._clean]
        self._flat = [part.reshape(-1, part.shape[2]) for part in parts]

    def chunk(self, index: int) -> list[Tensor]:
        """[chunk_size, B, D] of each operand, padding 0 (the last chunk may be shorter). Not to be written to."""
        begin, end = self.schedule.bounds(index)
        return [part[begin:end].contiguous() for part in self._clean]

    def panel(self, panel: Panel, fills: tuple[float, ...] | None = None) -> list[Tensor]:
        """[S, n, D] of each operand; where a block has no token its value of `fills`, or 0."""
        index = self._index(panel)
        count = self.schedule.rows * self.schedule.length
        rows = index.clamp_max(count - 1) if panel.padded else index
        taken = [flat.index_select(0, rows).view(panel.longest, -1, flat.shape[1]) for flat in self._flat]
        if panel.padded:
            missing = (index == count).view(panel.longest, -1, 1)
            fills = fills or (0.0,) * len(taken)
            taken = [part.masked_fill_(missing, fill) for part, fill in zip(taken, fills, strict=True)]
        return taken

    def resets(self, index: int) -> tuple[Tensor, Tensor] | None:
        """(token of the chunk, row) where a document starts from zero."""
        begin, end = self.schedule.reset_ranges[index]
        if begin == end:
            return None
        return self.schedule.reset_slot[begin:end] - self.schedule.bounds(index)[0], self.schedule.reset_row[begin:end]

    def entries(self, panel: Panel) -> Tensor:
        """[n] into the states [(chunk_size + 1) * B] of the panel's chunk: what each block starts from.

        Not for fresh panels: their blocks start from zero.
        """
        blocks, first = slice(panel.begin, panel.end), panel.chunk * self.schedule.chunk_size
        return (self.schedule.block_entry[blocks] - first) * self.schedule.rows + self.schedule.block_row[blocks]

    def empty(self, size: int) -> Tensor:
        """Zeros to be filled by `put_chunk` and `put_panel` and read by `tokens`."""
        like = self._flat[0]
        return like.new_zeros(self.schedule.rows * self.schedule.length + 1, size)

    def put_chunk(self, flat: Tensor, index: int, values: Tensor) -> None:
        """Write values [chunk_size, B, D] to the chunk's slots."""
        begin, end = self.schedule.bounds(index)
        self.tokens(flat)[:, begin:end] = values.transpose(0, 1)

    def put_panel(self, flat: Tensor, panel: Panel, values: Tensor) -> None:
        """Write values [S, n, D] to the panel's tokens; those of missing tokens fall into the spare last row."""
        flat.index_copy_(0, self._index(panel), values.reshape(-1, values.shape[2]))

    def tokens(self, flat: Tensor) -> Tensor:
        """[B, T, D] view"""
        return flat[:-1].view(self.schedule.rows, self.schedule.length, flat.shape[1])

    def _index(self, panel: Panel) -> Tensor:
        """[S * n], time-first"""
        return self.schedule.block_token[panel.begin : panel.end, : panel.longest].t().reshape(-1)
