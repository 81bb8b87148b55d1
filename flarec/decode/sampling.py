"""Sampling with counter-hash noise: a token is a pure function of its logits, the request's seed and its position.

The token for document position `t` is `argmax(logits + T * Gumbel(seed, t, token))` over the truncated vocabulary. The
noise depends on nothing else: not on the row, the step, the slot in the batch or the device. A draft for `t` that uses
the same noise is therefore accepted whenever its logits lead to the same choice, and AR-Trust returns what causal
decoding returns. T = 0 is the same formula. Contract: docs/semantics.md section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.base.flat import sent
from flarec.base.generation import GenerationOptions
from flarec.kernels import sampling as kernel
from flarec.kernels.sampling import UNCHOSEN, mask_of

__all__ = ["UNCHOSEN", "SamplingRows", "choose", "near"]


@dataclass(frozen=True)
class SamplingRows:
    """Sampling parameters of N rows as vectors, so that one batch can mix requests.

    temperature [N] float32, top_k [N] int64 (a huge number where off), top_p [N] float32, seed [N] int64.
    `truncated` / `sampled` say whether any row truncates / has a temperature above 0: known on the host, so that work
    which cannot change the result is skipped without asking the device.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    truncated: bool
    sampled: bool

    @staticmethod
    def build(options: Sequence[GenerationOptions], device: torch.device | str = "cpu") -> SamplingRows:
        everything = 2**62
        return SamplingRows(
            sent(torch.tensor([row.temperature for row in options], dtype=torch.float32), device),
            sent(torch.tensor([row.top_k or everything for row in options], dtype=torch.int64), device),
            sent(torch.tensor([row.top_p for row in options], dtype=torch.float32), device),
            sent(torch.tensor([row.seed for row in options], dtype=torch.int64), device),
            truncated=any(row.top_k or row.top_p < 1 for row in options),
            sampled=any(row.temperature > 0 for row in options),
        )

    def take(self, rows: Tensor) -> SamplingRows:
        """The parameters of rows `rows` [n] int64, in that order."""
        return self.changed(lambda values: values[rows], self.truncated, self.sampled)

    def changed(self, change: Callable[[Tensor], Tensor], truncated: bool, sampled: bool) -> SamplingRows:
        """With every vector changed."""
        temperature, top_k, top_p, seed = (change(tensor) for tensor in self.tensors())
        return SamplingRows(temperature, top_k, top_p, seed, truncated, sampled)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.temperature, self.top_k, self.top_p, self.seed

    def join(self, other: SamplingRows) -> SamplingRows:
        """The rows of both."""
        return SamplingRows(
            torch.cat([self.temperature, other.temperature]),
            torch.cat([self.top_k, other.top_k]),
            torch.cat([self.top_p, other.top_p]),
            torch.cat([self.seed, other.seed]),
            self.truncated or other.truncated,
            self.sampled or other.sampled,
        )


def choose(
    logits: Tensor,
    params: SamplingRows,
    positions: Tensor,
    suppress: Sequence[int] | Tensor | None = (),
    *,
    confidence: bool = True,
    per: int = 1,
    source: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose one token per row.

    logits [N, V] (any float dtype, computed in float32), params of N rows, positions [N] int64 = absolute document
    position of the token that is being chosen, suppress = ids that are never chosen, or a mask of them ([V] or [N, V]
    bool). `flarec.kernels.sampling.choose` is the same for tensors; per and source are explained there.
    Returns token [N] int64 and its probability [N] float32 under the truncated softmax(logits / T) (T = 0: T = 1), or 0
    without `confidence`.
    Equal scores go to the lowest id. A row whose largest logit is not a finite float32 (NaN anywhere, infinity, or
    nothing left to choose) gives `UNCHOSEN` with probability 0.
    """
    if suppress is not None and not (isinstance(suppress, Tensor) and suppress.dtype == torch.bool):
        suppress = mask_of(suppress, logits.shape[1], logits.device)
    choice = kernel.choose(
        logits, params.temperature, params.top_k, params.top_p, params.seed, positions, suppress,
        truncated=params.truncated, sampled=params.sampled, confidence=confidence, per=per, source=source,
    )
    return choice.token, choice.probability


def near(
    logits: Tensor, token: Tensor, choice: Tensor, share: float, params: SamplingRows, positions: Tensor,
    suppress: Tensor | None = None, *, per: int = 1,
) -> Tensor:
    """[N] bool: whether a token is the choice, or nearly as good (`flarec.kernels.sampling.near`)."""
    return kernel.near(
        logits, token, choice, share, params.temperature, params.top_k, params.top_p, params.seed, positions, suppress,
        truncated=params.truncated, sampled=params.sampled, per=per,
    )
