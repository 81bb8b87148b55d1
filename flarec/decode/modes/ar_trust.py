"""AR-Trust: noisy blocks draft, the clean stream decides. Returns what causal decoding returns, in fewer forwards.

One forward verifies the drafts and drafts the next block. Its clean rows are the pending token (emitted, not yet in the
cache) and the drafts; clean row i chooses the token at its position plus one. A draft is accepted while it equals that
choice; the first choice that differs (or the one after the last draft) is the next pending token. Noisy row l drafts
the token for l + 1, with that position's noise. Worked example: docs/semantics.md section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..plan import StepShape
from ..policy import Drafting, DraftPolicy
from ..request import Origin, Request
from ..rows import Rows
from ..stepper import BlockSpec


class ARTrustMode:
    """State: pending [rows], drafts [rows, block size] and have [rows], how many of them are drafts.

    branches: one block after every clean row, so whatever is accepted, the next block is there; else one block after
    the last draft, so that a rejection costs a forward with one clean row.
    policy: decides how many blocks a step has and how long they are; None: `branches`, as long as they were trained.
    `Request.ready`: drafts that it has for the next step.
    """

    def __init__(self, blocks: BlockSpec, *, branches: bool = True, policy: DraftPolicy | None = None) -> None:
        self.blocks = blocks
        self.pending = 1 + blocks.size
        self.branches = branches
        self.policy = policy
        self.verified = blocks.size  # drafts that the step verifies, at most

    def start(self, rows: Rows, clean: Tensor, noisy: Tensor) -> Tensor:
        token, _ = rows.choose(clean, rows.ahead(1))
        rows.note(clean, token)
        self._keep(rows, token, noisy[:, 0], torch.ones_like(rows.cache.length, dtype=torch.bool))
        have = rows.state["have"][:, None]
        return torch.cat([torch.full_like(token, -1), have, token], dim=1)

    def shape(self, rows: Rows) -> StepShape:
        clean = 1 + max(request.ready for request in rows.requests)
        size, branches = self.blocks.size, self.branches
        if self.policy is not None:  # a step verifies as many drafts as a block of its has: one graph per choice
            size, branches = self.policy.next(rows.width)
            clean = 1 + size
        self.verified = clean - 1
        blocks = (clean if branches else 1) if size else 0
        return StepShape(rows.width, clean, clean, blocks, max(size, 1), size, self.blocks.readout)

    def inputs(self, rows: Rows, shape: StepShape) -> tuple[Tensor, Tensor | None]:
        state, noisy = rows.state, shape.length - shape.clean
        masked = torch.full((shape.rows, noisy), self.blocks.mask_token_id, device=rows.device)
        ids = torch.cat([state["pending"][:, None], state["drafts"][:, : shape.clean - 1], masked], dim=1)
        if shape.blocks == 1 < shape.clean:
            # a slot that nobody is in may believe to have drafts when the step has no rows for any
            return ids, state["have"].clamp_max(shape.clean - 1)[:, None] + 1
        return ids, None

    def read(self, rows: Rows, shape: StepShape, clean: Tensor, noisy: Tensor) -> Tensor:
        drafts, have, count = rows.state["drafts"], rows.state["have"], shape.clean - 1
        choice, _ = rows.choose(clean, rows.ahead(count + 1) + 1)
        rows.note(clean, choice)
        right = self.judge(rows, drafts[:, :count], choice[:, :-1])
        right = right & (torch.arange(count, device=rows.device) < have[:, None])
        accepted = right.long().cumprod(dim=1).sum(dim=1)
        rows.accept(accepted + 1)
        token = choice.gather(1, accepted[:, None])
        if not shape.blocks:
            rows.state |= {"pending": token[:, 0].clamp_min(0), "have": torch.zeros_like(have)}
        elif shape.blocks == shape.clean:  # the block anchored right after the accepted rows
            place = accepted[:, None, None, None].expand(-1, 1, *noisy.shape[2:])
            self._keep(rows, token, noisy.gather(1, place)[:, 0], accepted >= 0)
        else:  # the only one, useless unless all drafts were accepted
            self._keep(rows, token, noisy[:, 0], accepted == have.clamp_max(count))
        return torch.cat([accepted[:, None], rows.state["have"][:, None], choice], dim=1)

    def judge(self, rows: Rows, drafts: Tensor, choice: Tensor) -> Tensor:
        """[rows, n] bool: which drafts are right. A benchmark that replays acceptance says something else here."""
        return drafts == choice

    def _keep(self, rows: Rows, token: Tensor, logits: Tensor, useful: Tensor) -> None:
        """Note the next pending token [rows, 1], and the drafts of one block per row. logits [rows, b, V]."""
        count = logits.shape[1]
        draft, _ = rows.choose(logits, rows.ahead(count) + 1)
        # what cannot be chosen is a draft like any other: to be rejected
        rows.state |= {
            "pending": token[:, 0].clamp_min(0),
            "drafts": pad(draft.clamp_min(0), (0, self.blocks.size - count)),
            "have": count * useful.long(),
        }

    def report(self, request: Request, values: list[int]) -> None:
        accepted, have, *tokens = values
        held, request.ready = request.ready, have
        if accepted < 0:  # the start
            request.emit(tokens, ["clean"])
            return
        offered = min(held, self.verified)
        if self.policy is not None:
            self.policy.accepted(offered, accepted)
        request.count(accepted, offered)
        drafts: list[Origin] = ["accepted"] * accepted
        request.emit(tokens[: accepted + 1], [*drafts, "corrected" if accepted < offered else "clean"])

    def timed(self, shape: StepShape, seconds: float) -> None:
        if self.policy is not None:
            branches = shape.blocks in (0, shape.clean)
            self.policy.timed(shape.rows, Drafting(shape.block_heads, branches), seconds)
