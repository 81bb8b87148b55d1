"""The one entry for choosing tokens: a function of tensors that never waits for a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flarec.errors import UsageError

from .arithmetic import UNCHOSEN as UNCHOSEN

MOST_TOKENS = 2**20


class Choice(NamedTuple):
    """token [N] int64, `UNCHOSEN` where there is none; probability [N] float32 under the truncated softmax(logits / T)
    (T = 0: T = 1), 0 where there is no choice or nobody asked; ok [N] bool, whether there is one."""

    token: Tensor
    probability: Tensor
    ok: Tensor


def mask_of(ids: Sequence[int] | Tensor, vocab: int, device: torch.device | str) -> Tensor | None:
    """Ids that are never chosen as `choose` takes them: [vocab] bool, or None if there are none."""
    if len(ids) == 0:
        return None
    index = torch.as_tensor(ids, dtype=torch.int64, device=device)
    return torch.zeros(vocab, dtype=torch.bool, device=device).index_fill_(0, index, True)


def choose(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    position: Tensor,
    suppress: Tensor | None = None,
    *,
    truncated: bool = True,
    sampled: bool = True,
    confidence: bool = True,
    per: int = 1,
    source: Tensor | None = None,
    implementation: str | None = None,
) -> Choice:
    """argmax(logits + T * Gumbel(seed, position, id)) of every row, over what top-k and then top-p keep.

    logits [N, V] of any float dtype, computed in float32, V <= 2^20; temperature [N] float32 >= 0, top_k [N] int64 (V
    or more: off), top_p [N] float32 (1 or more: off), seed and position [N] int64; suppress [V] or [N, V] bool: never
    chosen, out before anything else. Equal scores go to the lowest id; a row whose largest other logit is not finite
    has no choice. docs/semantics.md section 4.

    The same bits on every device and by every implementation: "triton", "torch" or None for Triton where logits are on
    a GPU. truncated, sampled: False if it is known that no row truncates, or that all temperatures are 0; that saves
    work and changes nothing. confidence: False where the probability is not read. Works inside CUDA graphs.

    per: so many consecutive choices share their settings, which then have N / per elements; position is that of the
    first of them, and the others follow. source [N] int64: the row of logits that each choice reads, in the place of
    its own; then logits have any number of rows, and `suppress` as many.
    Raises `UsageError` for too large a vocabulary.
    """
    if logits.shape[1] > MOST_TOKENS:
        raise UsageError(f"a vocabulary of {logits.shape[1]} tokens is too large to choose from; at most {MOST_TOKENS}")
    implementation = implementation or ("triton" if logits.is_cuda else "torch")
    settings = (temperature, top_k, top_p, seed, position)
    operands = (logits, *settings, suppress, truncated, sampled, confidence, per, source)
    if torch.compiler.is_compiling():
        return Choice(*choose_op(*operands, implementation))
    return Choice(*_rows(implementation)(*operands))


def _rows(implementation: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if implementation == "triton":
        from .triton_choice import choose_rows

        return choose_rows
    from . import torch_choice

    return torch_choice.choose_rows


@torch.library.custom_op("flarec::choose", mutates_args=())
def choose_op(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor,
    suppress: Tensor | None, truncated: bool, sampled: bool, confidence: bool, per: int, source: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`choose_rows` of an implementation, for tracers: one op, so that no compiler reorders its arithmetic."""
    settings = (temperature, top_k, top_p, seed, position)
    return _rows(implementation)(logits, *settings, suppress, truncated, sampled, confidence, per, source)


@choose_op.register_fake
def _(logits, *others):  # type: ignore[no-untyped-def]
    source = others[10]
    rows = logits.shape[0] if source is None else source.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.bool),
    )
