"""Elastic horizon: every step takes the clean row's token and as many drafts behind it as are predicted to be safe.

A step's clean rows are the tokens that the step before took; behind them lies one block of masked positions. The last
clean row chooses the next token, which is always taken, and its horizon says how many drafts of the block may follow;
they do from the left while their confidence holds. Nothing is verified: each taken draft becomes a clean row, and so
decides what follows. Contract: docs/semantics.md section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import StepShape, step_shape
from ..request import Origin, Request
from ..rows import Rows
from ..stepper import BlockSpec


class ElasticMode:
    """State: tokens [rows, 1 + block size] and count [rows], how many of them the next step commits.

    threshold: confidence that a draft must reach. The program's rows are those of `HorizonProgram`. `Request.ready`:
    drafts that were taken with the last token.
    """

    lasting = False

    def __init__(self, blocks: BlockSpec, threshold: float, vocabulary: int) -> None:
        self.blocks = blocks
        self.pending = 1 + blocks.size
        self.threshold = threshold
        self.vocabulary = vocabulary

    def start(self, rows: Rows, clean: Tensor, noisy: Tensor) -> Tensor:
        return self._take(rows, clean, noisy[:, 0])

    def shape(self, rows: Rows) -> StepShape:
        size = self.blocks.size
        clean = 1 + size if any(request.ready for request in rows.requests) else 1  # two shapes: few graphs
        return step_shape(rows.width, clean, clean, 1, size, size, self.blocks.readout)

    def inputs(self, rows: Rows, shape: StepShape) -> tuple[Tensor, Tensor]:
        masked = rows.constant(self.blocks.mask_token_id, shape.rows, shape.block_size)
        ids = torch.cat([rows.state["tokens"][:, : shape.clean], masked], dim=1)
        return ids, self._count(rows, shape)[:, None]

    def read(self, rows: Rows, shape: StepShape, clean: Tensor, noisy: Tensor) -> Tensor:
        count = self._count(rows, shape)
        rows.accept(count)
        place = (count - 1)[:, None, None].expand(-1, 1, clean.shape[2])
        return self._take(rows, clean.gather(1, place), noisy[:, 0])

    def _count(self, rows: Rows, shape: StepShape) -> Tensor:
        """[rows] clean rows to commit. A slot that nobody is in may believe to have more than the step has rows."""
        return rows.state["count"].clamp(1, shape.clean)

    def _take(self, rows: Rows, clean: Tensor, noisy: Tensor) -> Tensor:
        """Choose what follows from the last clean row [rows, 1, V + H] and the block behind it [rows, size, V + H].
        Returns how many drafts were taken, and the tokens with -1 behind them."""
        vocabulary, size = self.vocabulary, noisy.shape[1]
        logits, drafted = clean[..., :vocabulary], noisy[..., :vocabulary]
        first, _ = rows.choose(logits, rows.cache.length)
        drafts, confidence = rows.choose(drafted, rows.cache.length + 1, confidence=True)
        horizon = clean[:, 0, vocabulary:].argmax(dim=1, keepdim=True)
        slot = torch.arange(size, device=rows.device)
        safe = (slot < horizon) & (confidence >= self.threshold) & (drafts >= 0)
        taken = safe.long().cumprod(dim=1).sum(dim=1)
        tokens = torch.cat([first, drafts], dim=1)
        rows.state |= {"tokens": tokens.clamp_min(0), "count": taken + 1}
        if (note := rows.note(logits, first)) is not None:
            behind = rows.note(drafted, drafts)
            assert behind is not None
            rows.notes = torch.cat([note, behind], dim=1)
        kept = torch.arange(size + 1, device=rows.device) <= taken[:, None]
        return torch.cat([taken[:, None], tokens.where(kept, -1)], dim=1)

    def report(self, request: Request, values: list[int]) -> None:
        taken, *tokens = values
        request.count(taken)
        request.ready = taken
        drafts: list[Origin] = ["unverified"] * taken
        request.emit(tokens[: taken + 1], ["clean", *drafts])

    def timed(self, shape: StepShape, seconds: float) -> None:
        pass
