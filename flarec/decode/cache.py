"""The cache of a batch of requests, with the deferred commit of docs/kernels.md ("Decoding with the same equations").

A step never stores a state per candidate row. It leaves its clean rows *pending*; the next step first commits the first
`accepted[b]` of them, then works. So a rejected draft costs nothing to undo: keys and values beyond `length` are dead
and get overwritten, pending rows beyond `accepted` are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.ir.slots import CacheSlot

GRANULE = 64  # positions; small steps at first, larger ones once the cache is large
LARGE_GRANULE = 256


@dataclass
class Cache:
    """Decode state of a batch of requests.

    slots     what the program asked for
    tensors   name -> tensor; a step replaces entries, except keys and values, which it writes in place
    accepted  [batch] int64: how many of the last step's clean rows (counted from the left) the next step commits
    length    [batch] int64: committed plus accepted clean tokens = `cached` of the next layout
    capacity  positions that every "capacity" axis holds
    """

    slots: tuple[CacheSlot, ...]
    tensors: dict[str, Tensor]
    accepted: Tensor
    length: Tensor
    capacity: int

    @staticmethod
    def allocate(
        slots: Sequence[CacheSlot], batch: int, capacity: int, device: torch.device | str, pending: int = 0
    ) -> Cache:
        """An empty cache: zeros everywhere, room for at least `capacity` positions and for `pending` pending rows."""
        capacity = _round_up(capacity)
        tensors = {}
        for slot in slots:
            sizes = {"batch": batch, "capacity": capacity, "pending": 0}
            shape = [sizes[size] if isinstance(size, str) else size for size in slot.shape]
            axis = slot.pending_dim()
            if axis is not None:
                shape[axis] += pending
            if slot.kind == "conv":  # as kernels write it: channels next to each other
                shape[-2:] = shape[:-3:-1]
            tensor = torch.zeros(shape, dtype=slot.dtype, device=device)
            tensors[slot.name] = tensor.transpose(-1, -2) if slot.kind == "conv" else tensor
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        return Cache(tuple(slots), tensors, zeros, zeros.clone(), capacity)

    @property
    def batch(self) -> int:
        return self.length.shape[0]

    @property
    def has_states(self) -> bool:
        """Whether a request is more than keys and values, which are there at every position."""
        return not all(slot.in_place for slot in self.slots)

    def accept(self, rows: Tensor) -> None:
        """Keep the first `rows[b]` clean rows of the step that just ran (the next step commits them). rows [batch]."""
        self.keep(rows.clone(), self.length + rows)  # the caller may reuse `rows`, a step may clear `accepted`

    def keep(self, accepted: Tensor, length: Tensor) -> None:
        """The values of `accepted` and `length` from now on, as they are: nobody else has them."""
        self.accepted, self.length = accepted, length

    def reserve(self, capacity: int) -> None:
        """Grow every "capacity" axis to hold at least `capacity` positions; contents stay, new positions are zero."""
        if capacity <= self.capacity:
            return
        capacity = _round_up(capacity)
        for slot in self.slots:
            if "capacity" not in slot.shape:
                continue
            old = self.tensors[slot.name]
            axis = slot.shape.index("capacity")
            shape = list(old.shape)
            shape[axis] = capacity
            new = old.new_zeros(shape)
            new.narrow(axis, 0, old.shape[axis]).copy_(old)
            self.tensors[slot.name] = new
        self.capacity = capacity

    def select(self, rows: Tensor, capacity: int | None = None) -> None:
        """Keep the requests `rows` [n] int64 in that order; the others leave the batch. capacity: positions that those
        who stay need, if fewer than before."""
        self.capacity = min(self.capacity, _round_up(capacity or self.capacity))
        for slot in self.slots:
            tensor = self.tensors[slot.name]
            if slot.in_place:
                tensor = tensor.narrow(slot.shape.index("capacity"), 0, self.capacity)
            self.tensors[slot.name] = tensor.index_select(slot.batch_dim(), rows)
        self.accepted = self.accepted.index_select(0, rows)
        self.length = self.length.index_select(0, rows)

    def join(self, other: Cache) -> None:
        """Append the requests of `other`, a cache of the same program that is not used any more."""
        self.reserve(other.capacity)
        other.reserve(self.capacity)
        for slot in self.slots:
            pair = [self.tensors[slot.name], other.tensors[slot.name]]
            axis = slot.pending_dim()
            if axis is not None:
                width = max(tensor.shape[axis] for tensor in pair)
                pair = [widened(tensor, axis, width) for tensor in pair]
            self.tensors[slot.name] = torch.cat(pair, dim=slot.batch_dim())
        self.accepted = torch.cat([self.accepted, other.accepted])
        self.length = torch.cat([self.length, other.length])


def widened(tensor: Tensor, axis: int, width: int) -> Tensor:
    """With zeros behind it along an axis, if it has less than `width`: pending rows that are not accepted may hold
    anything finite."""
    missing = width - tensor.shape[axis]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def _round_up(capacity: int) -> int:
    granule = GRANULE if capacity <= 4 * LARGE_GRANULE else LARGE_GRANULE
    return max(1, -(-capacity // granule)) * granule
