"""What lies between the choices of an AR-Trust step: which drafts are right, and what the next step starts from.

`torch_drafts` computes it in PyTorch operations, `triton_drafts` in one launch each: on a GPU a step waits longer for
the launches of some forty small operations than for the operations.
"""

from __future__ import annotations

from .between import keep, verify
from .results import NextDrafts, Verified

__all__ = ["NextDrafts", "Verified", "keep", "verify"]
