"""Between the choices of an AR-Trust step: two Triton launches, a program per request."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .results import NextDrafts, Verified


@triton.jit
def verify_kernel(
    choice, drafts, have, length, active, right, accepted, commit, now, token, source,
    choice_row, drafts_row, right_row,
    COUNT: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr, HEADS_TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, TILE)
    drafted = slot < tl.minimum(tl.load(have + row), COUNT)
    if right is not None:
        good = tl.load(right + row * right_row + slot, mask=drafted, other=0) != 0
    else:
        chosen = tl.load(choice + row * choice_row + slot, mask=drafted, other=0)
        good = tl.load(drafts + row * drafts_row + slot, mask=drafted, other=1) == chosen
    first_wrong = tl.min(tl.where(drafted & good, TILE, slot), 0)
    number = tl.minimum(first_wrong, COUNT).to(tl.int64)
    kept = number + 1
    if active is not None:
        kept = tl.where(tl.load(active + row) != 0, kept, 0)
    tl.store(accepted + row, number)
    tl.store(commit + row, kept)
    tl.store(now + row, tl.load(length + row) + kept)
    tl.store(token + row, tl.load(choice + row * choice_row + number))
    if source is not None:
        head = tl.arange(0, HEADS_TILE)
        tl.store(source + row * HEADS + head, (row * BLOCKS + number) * HEADS + head, mask=head < HEADS)


@triton.jit
def keep_kernel(
    accepted, token, choice, draft, have, pending, drafts, now, report,
    choice_row, draft_row,
    COUNT: tl.constexpr, DRAFTED: tl.constexpr, SIZE: tl.constexpr, BRANCHES: tl.constexpr, TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, TILE)
    number = tl.load(accepted + row)
    held = tl.full((), DRAFTED, tl.int64)
    if not BRANCHES:
        held = tl.where(number == tl.minimum(tl.load(have + row), COUNT), held, 0)
    found = tl.maximum(tl.load(draft + row * draft_row + slot, mask=slot < DRAFTED, other=0), 0)
    tl.store(pending + row, tl.maximum(tl.load(token + row), 0))
    tl.store(drafts + row * SIZE + slot, found, mask=slot < SIZE)
    tl.store(now + row, held)
    report += row * (COUNT + 3)
    tl.store(report, number)
    tl.store(report + 1, held)
    chosen = tl.load(choice + row * choice_row + slot, mask=slot <= COUNT, other=0)
    tl.store(report + 2 + slot, chosen, mask=slot <= COUNT)


def _empty(like: Tensor, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.int64, device=like.device)


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.view(torch.uint8)


@torch.no_grad()
def verify(
    choice: Tensor, drafts: Tensor, have: Tensor, length: Tensor, active: Tensor | None, blocks: int, heads: int,
    right: Tensor | None,
) -> Verified:
    rows, count = choice.shape[0], choice.shape[1] - 1
    accepted, commit, now, token = (_empty(choice, rows) for _ in range(4))
    source = _empty(choice, rows * heads) if blocks > 1 else None
    right = None if right is None else right.contiguous()
    if rows:
        verify_kernel[(rows,)](
            choice.contiguous(), drafts, have, length, _bytes(active), _bytes(right), accepted, commit, now, token,
            source, count + 1, drafts.stride(0), count, COUNT=count, TILE=triton.next_power_of_2(max(count, 1)),
            BLOCKS=blocks, HEADS=heads, HEADS_TILE=triton.next_power_of_2(max(heads, 1)), num_warps=1,
        )
    return Verified(accepted, commit, now, token, source)


@torch.no_grad()
def keep(
    verified: Verified, choice: Tensor, draft: Tensor, have: Tensor, size: int, branches: bool
) -> NextDrafts:
    rows, count, drafted = choice.shape[0], choice.shape[1] - 1, draft.shape[1]
    pending, now = _empty(choice, rows), _empty(choice, rows)
    drafts, report = _empty(choice, rows, size), _empty(choice, rows, count + 3)
    if rows:
        keep_kernel[(rows,)](
            verified.accepted, verified.token, choice.contiguous(), draft.contiguous(), have,
            pending, drafts, now, report, count + 1, drafted, COUNT=count, DRAFTED=drafted, SIZE=size,
            BRANCHES=branches, TILE=triton.next_power_of_2(max(size, count + 1)), num_warps=1,
        )
    return NextDrafts(pending, drafts, now, report)
