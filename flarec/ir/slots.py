"""What one decode state of a lowered program looks like: the program lists its slots, the decoder allocates them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HORIZON = "horizon"
"""Output of a program that predicts how many drafts are safe: [N, positions + 1] logits beside those of the tokens."""


@dataclass(frozen=True)
class CacheSlot:
    """One cache tensor of a lowered decode program.

    name   key of the tensor in `Cache.tensors`
    kind   what the op calls it (`flarec.ops`): "keys", "values", "conv" (the raw inputs of a short convolution),
           "state", "pending_*" (the last step's clean rows, see `Cache`), ...
    shape  sizes; "batch" is the number of requests, "capacity" the positions that keys and values can hold
           (slot index = absolute position; such a tensor is written in place), "pending"
           the clean rows that the last step left uncommitted (0 at the start). A conv slot names its width at the
           start, `("batch", channels, W - 1)`: a step with n clean rows leaves W - 1 + n columns.
    dtype  element type
    """

    name: str
    kind: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    @property
    def in_place(self) -> bool:
        """Whether a step writes it; every other slot comes back as an output."""
        return "capacity" in self.shape

    def pending_dim(self) -> int | None:
        """Index of the axis that grows by the clean rows of a step, if there is one."""
        if "pending" in self.shape:
            return self.shape.index("pending")
        return len(self.shape) - 1 if self.kind == "conv" else None

    def batch_dim(self) -> int:
        """Index of the request axis."""
        return self.shape.index("batch")
