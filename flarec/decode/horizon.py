"""A decode program with a horizon: how many drafts are safe, beside the logits of every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..ir.slots import HORIZON, CacheSlot
from ..layout import Layout
from .cache import Cache
from .plan import Lowered

LOGITS = "logits"


class WithHorizon(Lowered, Protocol):
    """A lowered decode program whose outputs are the logits, a horizon, and the next decode state."""

    @property
    def outputs(self) -> Sequence[str]: ...

    def results(
        self, input_ids: Tensor, *, layout: Layout | None = None, head_rows: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, ...]:
        """One forward: a tensor per name in `outputs`."""
        ...


class HorizonProgram:
    """A `DecodeProgram` around one that was lowered with `predict-horizon`. Rows of its logits are wider: [N, V + H].

    Behind the logits of the next token stand those of 0 .. H - 1 safe drafts. Modes, plans and prefixes pass rows on as
    they are, so that nothing but the mode has to know.
    """

    def __init__(self, program: WithHorizon) -> None:
        self.program = program

    @property
    def cache_slots(self) -> Sequence[CacheSlot]:
        return self.program.cache_slots

    @property
    def vocab_size(self) -> int:
        return self.program.vocab_size

    @property
    def device(self) -> torch.device:
        return self.program.device

    def step(self, input_ids: Tensor, layout: Layout, head_rows: Tensor, cache: Cache) -> Tensor:
        """As `DecodeProgram.step`, with wider rows."""
        program = self.program
        with torch.no_grad():
            results = program.results(input_ids, layout=layout, head_rows=head_rows, cache=cache)
        named = dict(zip(program.outputs, results, strict=True))
        cache.tensors.update({name: tensor for name, tensor in named.items() if name in cache.tensors})
        return torch.cat([named[LOGITS], named[HORIZON].to(named[LOGITS].dtype)], dim=1)
