"""Noise of a training step: the kind of each block, its masked and its wrong positions. Contract: docs/semantics.md
section 3.

Everything is drawn on the CPU from one explicit generator that depends on (seed, step) alone, so that a resumed run and
a run with other micro batches see the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...recipe.diffusion import Diffusion
from .kinds import Kinds


def step_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for optimizer step `step` of a run with `seed`; distinct pairs give unrelated streams."""
    digest = hashlib.blake2b(f"flarec noise {seed} {step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def stratified_rates(count: int, generator: torch.Generator) -> Tensor:
    """[count] float64 mask rates: uniform on [0, 1), exactly one in each interval [i/count, (i+1)/count), shuffled."""
    strata = torch.randperm(count, generator=generator)
    return (strata + torch.rand(count, generator=generator, dtype=torch.float64)) / max(1, count)


@dataclass(frozen=True)
class Noise:
    """The draws for `n` blocks.

    kinds   of the blocks
    masked  [n, B] bool   masked positions of the first view; the second view masks the complement
    wrong   [n, B] int64  what a position shows in the view that does not mask it; -1: its own token. None: no kind has
                          wrong tokens
    ids     [n, B] int64  what a position shows where it is masked; None: the mask token
    """

    kinds: Kinds
    masked: Tensor
    wrong: Tensor | None = None
    ids: Tensor | None = None

    def select(self, keep: Tensor) -> Noise:
        """Of other blocks: numbers [m] int64."""
        wrong, ids = (None if drawn is None else drawn[keep] for drawn in (self.wrong, self.ids))
        return Noise(self.kinds[keep], self.masked[keep], wrong, ids)

    def hide(self, shown: Tensor, masked: Tensor, block: Tensor, mask_token_id: int) -> Tensor:
        """What copies of blocks `block` [copies] have as input: `shown` [copies, B] ids, hidden where `masked`."""
        if self.ids is None:
            return shown.masked_fill(masked, mask_token_id)
        return torch.where(masked, self.ids[block], shown)


def draw_noise(
    count: int, diffusion: Diffusion, generator: torch.Generator, texts: Sequence[Tensor] = (),
    pool: Tensor | None = None,
) -> Noise:
    """Draw kinds, then rates stratified over the randomly masked blocks, then one Bernoulli per position, then wrong
    tokens if a kind has some: from `texts`, token ids [..] int64 of the step's documents; then random ids from `pool`
    [P] int64, where these stand for masks."""
    kinds = diffusion.kinds
    # `searchsorted` on the cumulated probabilities; the last bound is left out so that rounding cannot exceed it.
    bounds = torch.tensor([probability for probability, _ in kinds], dtype=torch.float64).cumsum(0)[:-1]
    number = torch.searchsorted(bounds, torch.rand(count, generator=generator, dtype=torch.float64), right=True)
    drawn = Kinds.of(diffusion, number)
    uniform = torch.rand(count, diffusion.block_size, generator=generator, dtype=torch.float64)
    is_random = drawn.random
    rate = torch.ones(count, dtype=torch.float64)
    rate[is_random] = stratified_rates(int(is_random.sum()), generator)
    wrong = _wrong(drawn, uniform.shape, generator, texts) if any(kind.wrong_tokens for _, kind in kinds) else None
    ids = pool[torch.randint(len(pool), uniform.shape, generator=generator)] if pool is not None else None
    return Noise(drawn, uniform < rate[:, None], wrong, ids)


def _wrong(kinds: Kinds, shape: torch.Size, generator: torch.Generator, texts: Sequence[Tensor]) -> Tensor:
    """[n, B] int64: a token of the texts, or -1."""
    share, place = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    pool = torch.cat([torch.zeros(0, dtype=torch.int64), *texts])
    tokens = pool[(place * len(pool)).long()] if len(pool) else torch.zeros(shape, dtype=torch.int64)
    return tokens.masked_fill(share >= kinds.wrong_tokens[:, None], -1)
