"""What a request drafts next: a function of what came of its last forward. No state, no torch, no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Proposal:
    """How the drafts of a step are laid out.

    mask    id of the mask token
    drafts  K, most drafts that a step verifies
    block   B, masks behind them: the positions of a noisy block, K <= B
    """

    mask: int
    drafts: int
    block: int

    @property
    def width(self) -> int:
        """Tokens of every proposal. It is constant: CUDA graphs are for one length, and so is vLLM's buffer of the
        gated delta rule on a CPU."""
        return self.drafts + self.block

    def real(self, scheduled: Sequence[int]) -> int:
        """How many of the tokens that a step verified were drafts: those before the first mask."""
        return next((number for number, token in enumerate(scheduled) if token == self.mask), len(scheduled))

    def next(self, scheduled: Sequence[int], sampled: Sequence[int], best: Sequence[int]) -> list[int]:
        """The tokens to verify next, `width` of them, or none for a request that is not asked for a token yet.

        scheduled  what stood behind the pending token in the last forward: `[d1 .. dk, M ..]`, possibly cut
        sampled    what came of it: the accepted drafts and one token more; empty within a prompt
        best       the likeliest token of every row of that forward, the pending token's first: len(scheduled) + 1

        After k accepted drafts the first mask stood where the new pending token stands now, so the row of mask j says
        what comes j places behind it. After a rejection these rows read a wrong draft: nothing is drafted, only masked.
        """
        if len(best) != len(scheduled) + 1:
            raise ValueError(f"{len(best)} rows for {len(scheduled)} drafts")
        if not sampled:
            return []
        real = self.real(scheduled)
        fresh = list(best[real + 1 :])[: self.drafts] if len(sampled) - 1 == real else []
        return fresh + [self.mask] * (self.width - len(fresh))
