"""Diffusion-Trust: a block of masked positions is filled in a few denoising steps, several positions at a time.

Position l of the block is filled from noisy row l - 1, the first one from the clean row before the block, which runs
only in the block's first step: its choice is kept for the others. A finished block becomes clean rows of the next
block's first step (its commit). Contract: docs/semantics.md section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import StepShape, step_shape
from ..request import Origin, Request
from ..rows import Rows
from ..sampling import UNCHOSEN
from ..stepper import BlockSpec


class DiffusionTrustMode:
    """State: block [rows, size] (the mask token where masked; negative where a row could not choose, and a step then
    reads any id), masked [rows, size] bool, steps [rows] done in this block, first and confidence [rows] of its first
    position; if log-probabilities are wanted, the notes of the first one [rows, 1, n] and of the block [rows, size, n].

    threshold = confidence at which a position is committed (`_chosen`), steps = denoising steps per block (the last
    commits all).
    Rows may be at different stages of their blocks; one forward serves all. `Request.ready`: its block is full.
    """

    lasting = False

    def __init__(self, blocks: BlockSpec, threshold: float, steps: int) -> None:
        self.blocks = blocks
        self.pending = blocks.size
        self.threshold = threshold
        self.steps = steps

    def start(self, rows: Rows, clean: Tensor, noisy: Tensor) -> Tensor:
        count, size = rows.width, self.blocks.size
        first, confidence = rows.choose(clean, rows.cache.length, confidence=True)
        rows.state = {
            "block": torch.full((count, size), self.blocks.mask_token_id, device=rows.device),
            "masked": torch.ones(count, size, dtype=torch.bool, device=rows.device),
            "steps": torch.zeros(count, dtype=torch.int64, device=rows.device),
            "first": first[:, 0],
            "confidence": confidence[:, 0],
        }
        if (note := rows.note(clean, first)) is not None:
            rows.state |= {"first_note": note, "notes": note.new_zeros(count, size, note.shape[2])}
        return self._denoise(rows, noisy[:, 0])

    def shape(self, rows: Rows) -> StepShape:
        size, full = self.blocks.size, any(request.ready for request in rows.requests)
        return step_shape(
            rows.width, size if full else 0, int(full), 1, size, self.blocks.heads, self.blocks.readout
        )

    def inputs(self, rows: Rows, shape: StepShape) -> tuple[Tensor, Tensor]:
        block, full = rows.state["block"], self._full(rows)
        clean = block.where(full[:, None], 0)[:, : shape.clean]  # of a block that is not full nothing is committed
        ids = torch.cat([clean, block.masked_fill(full[:, None], self.blocks.mask_token_id)], dim=1)
        return ids.clamp_min(0), (full * shape.clean)[:, None]

    def read(self, rows: Rows, shape: StepShape, clean: Tensor, noisy: Tensor) -> Tensor:
        full = self._full(rows)
        rows.accept(full * shape.clean)
        self._begin(rows, full)
        if shape.heads:
            first, confidence = rows.choose(clean, rows.cache.length, confidence=True)
            self._choose_first(rows, full, first[:, 0], confidence[:, 0], rows.note(clean, first))
        return self._denoise(rows, noisy[:, 0])

    def _begin(self, rows: Rows, fresh: Tensor) -> None:
        """A new block where fresh [rows] bool."""
        state = rows.state
        state["block"] = state["block"].masked_fill(fresh[:, None], self.blocks.mask_token_id)
        state["masked"] = state["masked"] | fresh[:, None]
        state["steps"] = state["steps"].masked_fill(fresh, 0)

    def _choose_first(
        self, rows: Rows, fresh: Tensor, first: Tensor, confidence: Tensor, note: Tensor | None
    ) -> None:
        """Its first token [rows] and that token's confidence [rows] and note [rows, 1, n]."""
        state = rows.state
        state["first"] = torch.where(fresh, first, state["first"])
        state["confidence"] = torch.where(fresh, confidence, state["confidence"])
        if note is not None:
            state["first_note"] = torch.where(fresh[:, None, None], note, state["first_note"])

    def _full(self, rows: Rows) -> Tensor:
        """[rows] bool: blocks that the next step commits."""
        return ~rows.state["masked"].any(dim=1)

    def _denoise(self, rows: Rows, logits: Tensor) -> Tensor:
        """Commit positions of the blocks. logits [rows, size - 1, V]. Returns their numbers, and the blocks with -1
        where they are masked."""
        state, count = rows.state, logits.shape[1]
        token, confidence = rows.choose(logits, rows.cache.length + 1, confidence=True) if count else (None, None)
        if token is None or confidence is None:
            token, confidence = state["first"][:, None], state["confidence"][:, None]
        else:
            token = torch.cat([state["first"][:, None], token], dim=1)
            confidence = torch.cat([state["confidence"][:, None], confidence], dim=1)
        masked = state["masked"]
        commit = masked & (self._chosen(masked, confidence) | (state["steps"] + 1 >= self.steps)[:, None])
        block = state["block"] = torch.where(commit, token, state["block"])
        state["masked"] = masked & ~commit
        state["steps"] = state["steps"] + 1
        if "notes" in state:
            behind = rows.note(logits, token[:, 1:])
            assert behind is not None
            notes = torch.cat([state["first_note"], behind], dim=1)
            rows.notes = state["notes"] = torch.where(commit[:, :, None], notes, state["notes"])
        return torch.cat([commit.sum(dim=1, keepdim=True), block.masked_fill(state["masked"], -1)], dim=1)

    def _chosen(self, masked: Tensor, confidence: Tensor) -> Tensor:
        """[rows, size] bool: positions to commit, at least one of the masked ones.

        Under the causal readout a position tells nothing to those before it, and is better guessed once it reads them:
        from the left, the first masked one and those behind it while they reach the threshold. Else those that reach
        it, and the most confident one (ties: the lowest).
        """
        sure = confidence >= self.threshold
        if self.blocks.readout == "causal":
            first = masked & (masked.long().cumsum(dim=1) == 1)
            return (~masked | first | sure).long().cumprod(dim=1).bool()
        best = confidence.masked_fill(~masked, -1.0).argmax(dim=1, keepdim=True)
        return sure.scatter(1, best, True)

    def report(self, request: Request, values: list[int]) -> None:
        """Emit what became final: the tokens before the first masked position."""
        count, *tokens = values
        if UNCHOSEN in tokens:  # also behind a masked position: it would be the input of the next step
            request.check(UNCHOSEN)
        final = tokens.index(-1) if -1 in tokens else len(tokens)
        request.count(count)
        request.ready = final == len(tokens)
        # earlier blocks are emitted in full, so the rest of the new tokens belong to this block
        place = len(request.tokens) % len(tokens)
        origins: list[Origin] = ["unverified"] * len(tokens)
        origins[0] = "clean"
        request.emit(tokens[place:final], origins[place:final], place)

    def timed(self, shape: StepShape, seconds: float) -> None:
        pass
