"""The invariants of docs/semantics.md section 5, each as a function that measures one and returns a `Result`.

`flarec verify` runs them on a real checkpoint, the tests on small models of every family. Each compares two ways to
compute the same numbers on small random inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flarec.base.prompts import read_prompts
from flarec.device import torch_device, torch_dtype
from flarec.errors import UsageError

from .adapter import (
    ar_trust_is_the_source,
    clean_rows_keep_their_bits,
    is_the_source_in_transformers,
    open_source,
    weights_are_the_sources,
)
from .decoding import ar_trust_is_causal, opens_in_transformers, rejected_draft_leaves_no_trace, split_is_whole
from .recheck import recheck_is_causal
from .streams import clean_logits, no_leak, views_share_a_row
from .subject import Result, Subject, open_subject
from .ties import TEXTS, ar_trust_up_to_ties, prompts_of

Check = Callable[..., Result]

INVARIANTS: dict[int, Check] = {
    1: clean_logits,
    2: no_leak,
    3: split_is_whole,
    4: ar_trust_is_causal,
    5: rejected_draft_leaves_no_trace,
    6: opens_in_transformers,
    7: views_share_a_row,
}


TITLES = {
    1: "clean logits against the source model", 2: "no leak", 3: "prefill and steps against one pass",
    4: "AR-Trust against causal decoding", 5: "rejected drafts leave no trace", 6: "decoding against transformers",
    7: "views and grids share a row", 8: "weights of the source", 9: "the adapter leaves clean rows",
    10: "the source in transformers", 11: "AR-Trust against the source's text",
    12: "a recheck of 1 against causal decoding",
}
"""What a check is called before it runs."""

QUICK: dict[int, dict[str, int]] = {
    **{number: {"cases": 1} for number in (1, 2, 3, 5, 6, 7, 9, 10)},
    **{number: {"cases": 2, "new_tokens": 8} for number in (4, 11, 12)},
}
"""The sizes of a quick run: every check, on a text or two."""
QUICK_TEXTS = 20
"""Of a quick run in another dtype."""


def verify(
    path: str | Path,
    *,
    kernels: str = "auto",
    seed: int = 0,
    passes: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    adapter: str | Path | None = None,
    source: str | Path | None = None,
    quick: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    prompts: Path | None = None,
    chat: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Result]:
    """Measure invariants 1 to 7 on a checkpoint or model directory (float32 on the CPU); results come one by one.

    For a checkpoint with an adapter also checks 8 to 11 of `flarec.verify.adapter`; 10 compares with `source`, the
    model that it was made from, and is left out without it. Of one that decodes by Diffusion-Trust or elastic also
    12, `recheck_is_causal`. adapter: of a model whose adapter lies elsewhere.

    quick: fewer and shorter texts, and no check behind every pass. say: called with a line before each slow part.
    dtype: not float32: AR-Trust against causal decoding in that dtype alone, near ties listed apart; then also
    device: that computes; prompts: a file whose first ones are continued instead of pieces of a small text, with `chat`
    behind the chat template.

    Raises `CheckpointError` or `UsageError` for a directory that cannot be opened.
    """
    computed = torch_dtype(dtype) or torch.float32
    other = computed != torch.float32
    if other and source is not None:
        raise UsageError(f"a source is compared with in float32; leave it out, or dtype {dtype}")
    place = torch_device(device)
    if not other and (place.type != "cpu" or prompts is not None or chat):
        raise UsageError(
            "the invariants are measured in float32 on the CPU, on texts of their own; device, prompts and chat go "
            "with dtype bfloat16 or float16"
        )
    if chat and prompts is None:
        raise UsageError("chat puts prompts into the chat template; give prompts too")
    if prompts is not None:
        next(read_prompts(prompts))  # said before the model is opened
    subject = open_subject(
        path, kernels=kernels, seed=seed, passes=passes, plugins=plugins, adapter=adapter, dtype=computed,
        device=place, debug=not quick and not other, say=say,
    )
    if other:
        say(f"{TITLES[4]} in {dtype}")
        count = QUICK_TEXTS if quick else TEXTS
        given = prompts_of(subject, prompts, count, chat=chat) if prompts is not None else None
        yield ar_trust_up_to_ties(subject, count, prompts=given)
        return
    if source is not None and subject.adapted is None:
        raise UsageError(f"{path} has no adapter, so its model is not its source; leave the source out")
    if source is not None:
        open_source(subject, source)  # said before the checks, which take their time
    checks = dict(INVARIANTS)
    if subject.adapted is not None:
        checks |= _adapter_checks(source)
    if subject.rechecked:
        checks[12] = recheck_is_causal
    for done, (number, check) in enumerate(checks.items(), 1):
        say(f"check {number} ({done} of {len(checks)}): {TITLES[number]}")
        sizes: dict[str, Any] = QUICK.get(number, {}) if quick else {}
        yield check(subject, **sizes)


def _adapter_checks(source: str | Path | None) -> dict[int, Check]:
    """Checks 8 to 11 by number."""
    checks: dict[int, Check] = {8: partial(weights_are_the_sources, source=source), 9: clean_rows_keep_their_bits}
    if source is not None:
        checks[10] = partial(is_the_source_in_transformers, source=source)
    checks[11] = partial(ar_trust_is_the_source, source=source)
    return checks


__all__ = [
    "INVARIANTS",
    "Result",
    "Subject",
    "ar_trust_is_causal",
    "ar_trust_up_to_ties",
    "clean_logits",
    "no_leak",
    "open_subject",
    "opens_in_transformers",
    "recheck_is_causal",
    "rejected_draft_leaves_no_trace",
    "split_is_whole",
    "verify",
    "views_share_a_row",
]
