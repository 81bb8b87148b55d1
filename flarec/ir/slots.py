"""What one decode state of a lowered program looks like: the program lists its slots, the decoder allocates them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

KINDS = (
    "keys",
    "values",
    "conv",
    "state",
    *("pending_k", "pending_d", "pending_g"),  # linear attention
    *("pending_x", "pending_dt", "pending_b", "pending_a"),  # selective scan, gated recurrence
)


@dataclass(frozen=True)
class CacheSlot:
    """One cache tensor of a lowered decode program.

    name   key of the tensor in `Cache.tensors`
    kind   one of `KINDS`: "keys"/"values" (slot index = absolute position, written in place), "conv" (the raw inputs of
           a short convolution), "state" (recurrent state), "pending_*" (the last step's clean rows, see `Cache`)
    shape  sizes; "batch" is the number of requests, "capacity" the positions that keys and values can hold, "pending"
           the clean rows that the last step left uncommitted (0 at the start). A conv slot names its width at the
           start, `("batch", channels, W - 1)`: a step with n clean rows leaves W - 1 + n columns.
    dtype  element type
    """

    name: str
    kind: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def batch_dim(self) -> int:
        """Index of the request axis."""
        return self.shape.index("batch")
