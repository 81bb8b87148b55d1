"""Log-probabilities of tokens under the clean stream, the model that the source was."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.flat import sent
from ..decode import Cache, Stepper
from ..decode.plan import DecodeProgram

SCORE_ROWS = 1024  # clean rows per forward while scoring: bounds the logits
Document = tuple[Sequence[int], Sequence[tuple[int, int]]]
"""Token ids, and spans [start, end) of those that are scored; start is at least 1."""


@dataclass(frozen=True)
class Scores:
    """Of the scored tokens of one document, in order.

    log_probs float64 [n], nats; greedy bool [n]: the token is the most probable one. Both on the CPU.
    """

    log_probs: Tensor
    greedy: Tensor


def score(
    program: DecodeProgram, documents: Sequence[Document], batch: int = 8, *, suppress: Collection[int] = ()
) -> list[Scores]:
    """Scores of every document, in the same order; `batch` documents of about the same length run together.

    The logits of `suppress` (the mask token, as in training) are minus infinity. Logits are in the dtype that the model
    computes in, normalised in float32. Documents have at most one token more than the model's context: the caller cuts
    them.
    """
    order = sorted(range(len(documents)), key=lambda index: len(documents[index][0]))
    found: dict[int, Scores] = {}
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        found.update(zip(part, _score([documents[index] for index in part], program, suppress), strict=True))
    return [found[index] for index in range(len(documents))]


@torch.no_grad()
def _score(documents: Sequence[Document], program: DecodeProgram, suppress: Collection[int]) -> list[Scores]:
    """`score` of documents that run as one batch, in chunks like a prefill."""
    rows = len(documents)
    lengths = [max(1, len(ids) - 1) for ids, _ in documents]  # a last token is only predicted
    longest, device = max(lengths), program.device
    ids = torch.zeros(rows, longest + 1, dtype=torch.int64)
    wanted = torch.zeros(rows, longest, dtype=torch.bool)  # rows of the clean stream that predict a scored token
    for row, (tokens, spans) in enumerate(documents):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        for start, end in spans:
            wanted[row, start - 1 : min(end, len(tokens)) - 1] = True
    ids = sent(ids, device)
    log_probs = torch.zeros(rows, longest, dtype=torch.float64, device=device)
    greedy = torch.zeros(rows, longest, dtype=torch.bool, device=device)
    never = sent(torch.tensor(sorted(suppress), dtype=torch.int64), device)
    cache = Cache.allocate(program.cache_slots, rows, longest, device)
    stepper = Stepper(program, cache)
    chunk = max(1, SCORE_ROWS // rows)
    for start in range(0, longest, chunk):
        counts = [min(max(length - start, 0), chunk) for length in lengths]
        plan = stepper.plan(counts)
        found = [wanted[row, start : start + count] for row, count in enumerate(counts)]
        here = sent(torch.cat(found).nonzero().squeeze(1), device)
        logits = stepper.run(
            plan, ids[:, start : start + plan.clean_length], plan.head_rows[here],
            cached=[min(start, length) for length in lengths],
        )
        cache.accept(plan.counts)
        place = plan.clean_request[here], plan.clean_slot[here] + start
        target = ids[place[0], place[1] + 1]
        logits = logits.float().index_fill(1, never, -math.inf)
        log_probs[place] = -torch.nn.functional.cross_entropy(logits, target, reduction="none").double()
        greedy[place] = logits.argmax(dim=1) == target
    log_probs, greedy = log_probs.cpu(), greedy.cpu()
    return [Scores(log_probs[row][wanted[row]], greedy[row][wanted[row]]) for row in range(rows)]
