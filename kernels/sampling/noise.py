"""Random ids: what the noisy positions of a block show where nothing is put in the place of their tokens.

Contract: docs/semantics.md section 3. The hash is that of the sampling noise with the one counter that no token has
(-1), so that the id of a position says nothing about what is sampled there.
"""

from __future__ import annotations

from torch import Tensor

from .arithmetic import random_words


def random_ids(seed: Tensor, position: Tensor, pool: Tensor) -> Tensor:
    """seed [R], position [R, n], pool [P] (ids to choose from), all int64 -> ids [R, n] int64.

    Every id of the pool has the same probability, up to P / 2^32 of it. The same bits on every device.
    """
    return pool[random_words(seed, position).mul_(len(pool)) >> 32]
