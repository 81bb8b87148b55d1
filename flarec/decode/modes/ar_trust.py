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

from flarec.kernels import drafts

from ..plan import StepShape, step_shape
from ..policy import CAUSAL, Drafting, DraftPolicy
from ..request import Origin, Request
from ..rows import Rows
from ..stepper import BlockSpec

CLEAN: list[Origin] = ["clean"]


class ARTrustMode:
    """State: pending [rows], drafts [rows, block size] and have [rows], how many of them are drafts.

    branches: one block after every clean row, so whatever is accepted, the next block is there; else one block after
    the last draft, so that a rejection costs a forward with one clean row.
    policy: decides how many blocks a step has and how long they are; None: `branches`, as long as they were trained.
    `Request.ready`: drafts that it has for the next step.

    A step without blocks, which only a policy chooses, does what one of causal decoding does, and no more.
    """

    def __init__(self, blocks: BlockSpec, *, branches: bool = True, policy: DraftPolicy | None = None) -> None:
        self.blocks = blocks
        self.pending = 1 + blocks.size
        self.branches = branches
        self.policy = policy
        self.lasting = policy is not None
        self.verified = blocks.size  # drafts that the step verifies, at most
        self._served, self._gave = 0, 0  # requests of the step, and their tokens

    def start(self, rows: Rows, clean: Tensor, noisy: Tensor) -> Tensor:
        token, _ = rows.choose(clean, rows.cache.length)
        rows.note(clean, token)
        draft, _ = rows.choose(noisy[:, 0], rows.cache.length + 1)
        rows.state |= {  # what cannot be chosen is a draft like any other: to be rejected
            "pending": token[:, 0].clamp_min(0),
            "drafts": pad(draft.clamp_min(0), (0, self.blocks.size - draft.shape[1])),
            "have": torch.full_like(rows.cache.length, draft.shape[1]),
        }
        return torch.cat([torch.full_like(token, -1), rows.state["have"][:, None], token], dim=1)

    def shape(self, rows: Rows) -> StepShape:
        if self.policy is not None:  # a step verifies as many drafts as a block of its has: one graph per choice
            drafting = self.policy.next(rows.width) if rows.timed else self.policy.unmeasured()
            size, blocks, clean = drafting.size, drafting.blocks, 1 + drafting.size
        else:
            clean = 1 + max(request.ready for request in rows.requests)
            size, blocks = self.blocks.size, clean if self.branches else 1
        self.verified = clean - 1
        self._served = self._gave = 0
        return step_shape(rows.width, clean, clean, blocks, max(size, 1), size, self.blocks.readout)

    def inputs(self, rows: Rows, shape: StepShape) -> tuple[Tensor, Tensor | None]:
        state, noisy = rows.state, shape.length - shape.clean
        if not shape.blocks:
            return state["pending"][:, None], None
        masked = rows.constant(self.blocks.mask_token_id, shape.rows, noisy)
        ids = torch.cat([state["pending"][:, None], state["drafts"][:, : shape.clean - 1], masked], dim=1)
        if shape.blocks == 1 < shape.clean:
            # a slot that nobody is in may believe to have drafts when the step has no rows for any
            return ids, state["have"].clamp_max(shape.clean - 1)[:, None] + 1
        return ids, None

    def read(self, rows: Rows, shape: StepShape, clean: Tensor, noisy: Tensor) -> Tensor:
        if not shape.blocks:
            return self._causal(rows, shape, clean)
        state, count = rows.state, shape.clean - 1
        choice, _ = rows.choose(clean, rows.cache.length + 1)
        rows.note(clean, choice)
        right = self.judge(rows, state["drafts"][:, :count], choice[:, :-1])
        verified = drafts.verify(
            choice, state["drafts"], state["have"], rows.cache.length, rows.active, blocks=shape.blocks,
            heads=shape.block_heads, right=right,
        )
        rows.cache.keep(verified.commit, verified.length)
        source, found = self.behind(rows, shape, verified)
        draft, _ = rows.choose(noisy.flatten(0, 1), verified.length + 1, source=source)
        branches = shape.blocks == shape.clean or found is not None
        kept = drafts.keep(verified, choice, draft, state["have"], self.blocks.size, branches=branches)
        rows.state |= {"pending": kept.pending, "drafts": kept.drafts, "have": kept.have}
        if found is None:
            return kept.report
        rows.state["have"] = have = kept.have * found
        return torch.cat([kept.report[:, :1], have[:, None], kept.report[:, 2:]], dim=1)

    def behind(self, rows: Rows, shape: StepShape, verified: drafts.Verified) -> tuple[Tensor | None, Tensor | None]:
        """Which noisy rows [rows * heads] draft what follows: those of the block behind the accepted rows, or of the
        only one (None). And which requests [rows] bool have such a block; None: the step's shape says it."""
        return verified.source, None

    def _causal(self, rows: Rows, shape: StepShape, clean: Tensor) -> Tensor:
        """One more token and no drafts. Returns the token alone."""
        assert shape.clean == 1
        rows.accept(rows.constant(1, shape.rows))
        token, _ = rows.choose(clean, rows.cache.length)
        rows.note(clean, token)
        rows.state |= {"pending": token[:, 0].clamp_min(0), "have": rows.constant(0, shape.rows)}
        return token

    def judge(self, rows: Rows, drafts: Tensor, choice: Tensor) -> Tensor | None:
        """[rows, n] bool: which drafts are right; None: those that equal the choice. A benchmark that replays
        acceptance says something else here."""
        return None

    def report(self, request: Request, values: list[int]) -> None:
        if len(values) == 1:  # a step without drafts
            request.ready = 0
            request.undrafted += 1
            request.emit(values, CLEAN)
            return
        accepted, have, *tokens = values
        held, request.ready = request.ready, have
        if accepted < 0:  # the start
            if self.policy is not None:
                self.policy.begun()
            request.emit(tokens, ["clean"])
            return
        offered = min(held, self.verified)
        self._served, self._gave = self._served + 1, self._gave + 1 + accepted
        if self.policy is not None:
            self.policy.accepted(offered, accepted)
        request.count(accepted, offered)
        drafts: list[Origin] = ["accepted"] * accepted
        request.emit(tokens[: accepted + 1], [*drafts, "corrected" if accepted < offered else "clean"])

    def timed(self, shape: StepShape, seconds: float) -> None:
        if self.policy is not None:
            tokens = self._gave / self._served if self._served else 1.0
            self.policy.timed(shape.rows, self.drafting_of(shape), seconds, tokens)

    def drafting_of(self, shape: StepShape) -> Drafting:
        """What the policy had chosen."""
        return Drafting(shape.block_heads, shape.blocks > 1) if shape.blocks else CAUSAL
