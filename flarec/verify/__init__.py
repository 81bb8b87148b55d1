"""The invariants of docs/semantics.md section 5, each as a function that measures one and returns a `Result`.

`flarec verify` runs them on a real checkpoint, the tests on small models of every family. Each compares two ways to
compute the same numbers on small random inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .decoding import ar_trust_is_causal, opens_in_transformers, rejected_draft_leaves_no_trace, split_is_whole
from .streams import clean_logits, no_leak, views_share_a_row
from .subject import Result, Subject, open_subject

INVARIANTS: dict[int, Callable[[Subject], Result]] = {
    1: clean_logits,
    2: no_leak,
    3: split_is_whole,
    4: ar_trust_is_causal,
    5: rejected_draft_leaves_no_trace,
    6: opens_in_transformers,
    7: views_share_a_row,
}


def verify(
    path: str | Path,
    *,
    kernels: str = "torch",
    seed: int = 0,
    passes: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
) -> Iterator[Result]:
    """Measure invariants 1 to 7 on a checkpoint or model directory (float32 on the CPU); results come one by one.

    Raises `CheckpointError` or `UsageError` for a directory that cannot be opened.
    """
    subject = open_subject(path, kernels=kernels, seed=seed, passes=passes, plugins=plugins)
    for check in INVARIANTS.values():
        yield check(subject)


__all__ = [
    "INVARIANTS",
    "Result",
    "Subject",
    "ar_trust_is_causal",
    "clean_logits",
    "no_leak",
    "open_subject",
    "opens_in_transformers",
    "rejected_draft_leaves_no_trace",
    "split_is_whole",
    "verify",
    "views_share_a_row",
]
