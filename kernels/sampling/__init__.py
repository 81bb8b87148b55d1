"""Choice of one token per row of logits: `reference` (the specification), `torch_choice` and `triton_choice`.

All three give the same bits for the same float32 logits, on every device: they add, multiply and compare in one fixed
order of IEEE operations, without fused multiply-adds and without a library's log or exp, and sum integers.
"""

from __future__ import annotations

from .choose import MOST_TOKENS, UNCHOSEN, Choice, choose, mask_of
from .near import near
from .noise import random_ids

__all__ = ["MOST_TOKENS", "UNCHOSEN", "Choice", "choose", "mask_of", "near", "random_ids"]
