"""Which setting of a mode decodes best: measured on one half of the prompts, reported on the other.

A prompt's half is a function of its tokens alone. It is the same in every run, whatever else the data hold, so that
nobody can look for a split that flatters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Half = Literal["choosing", "reporting"]
HALVES: tuple[Half, ...] = ("choosing", "reporting")
THRESHOLDS, RECHECKS, KEEP = (0.0, 0.5, 0.9, 0.99), (0.0, 0.3, 1.0), 0.97
"""What is tried, and the share of causal decoding's accuracy to keep, unless somebody says otherwise."""
_ROUNDING = 1e-9
"""Of `keep` times an accuracy, against an accuracy: both are sums of a few products."""


class Setting(NamedTuple):
    """What Diffusion-Trust and elastic decoding read (docs/semantics.md section 4); each in [0, 1]."""

    threshold: float
    recheck: float


def half_of(prompt: Sequence[int]) -> Half:
    """The half of a prompt, given as token ids."""
    digest = hashlib.sha256(",".join(map(str, prompt)).encode()).digest()
    return HALVES[digest[0] & 1]


def grid(thresholds: Sequence[float], rechecks: Sequence[float]) -> list[Setting]:
    """Every pair once, in order."""
    return [Setting(threshold, recheck) for recheck in sorted({*rechecks}) for threshold in sorted({*thresholds})]


def best(seen: Mapping[Setting, Mapping[str, Any]], causal: float, keep: float) -> Setting | None:
    """The setting with most tokens per forward among those that keep the share `keep` of causal decoding's accuracy;
    None if none does.

    seen: setting -> "accuracy" and "tokens_per_forward" on the half that chooses. Of several that are alike the more
    accurate one is taken, then the one that takes back more, then the one that commits less.
    """
    good = [setting for setting, row in seen.items() if row["accuracy"] >= keep * causal - _ROUNDING]

    def rank(setting: Setting) -> tuple[float, ...]:
        row = seen[setting]
        return (row["tokens_per_forward"], row["accuracy"], setting.recheck, setting.threshold)

    return max(good, key=rank, default=None)
