"""The invariants of docs/semantics.md section 5, each as a function that measures one and returns a `Result`.

`flarec verify` runs them on a real checkpoint, the tests on small models of every family. Each compares two ways to
compute the same numbers on small random inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flarec.errors import UsageError

from .adapter import (
    ar_trust_is_the_source,
    clean_rows_keep_their_bits,
    is_the_source_in_transformers,
    open_source,
    weights_are_the_sources,
)
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
    adapter: str | Path | None = None,
    source: str | Path | None = None,
) -> Iterator[Result]:
    """Measure invariants 1 to 7 on a checkpoint or model directory (float32 on the CPU); results come one by one.

    For a checkpoint with an adapter also checks 8 to 11 of `flarec.verify.adapter`; 10 compares with `source`, the
    model that it was made from, and is left out without it. adapter: of a model whose adapter lies elsewhere.

    Raises `CheckpointError` or `UsageError` for a directory that cannot be opened.
    """
    subject = open_subject(path, kernels=kernels, seed=seed, passes=passes, plugins=plugins, adapter=adapter)
    if source is not None and subject.adapted is None:
        raise UsageError(f"{path} has no adapter, so its model is not its source; leave the source out")
    if source is not None:
        open_source(subject, source)  # said before the checks, which take their time
    for check in INVARIANTS.values():
        yield check(subject)
    if subject.adapted is not None:
        yield weights_are_the_sources(subject, source)
        yield clean_rows_keep_their_bits(subject)
        if source is not None:
            yield is_the_source_in_transformers(subject, source)
        yield ar_trust_is_the_source(subject)


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
