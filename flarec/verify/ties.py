"""AR-Trust against causal decoding in another dtype than float32, where near ties go either way."""

from __future__ import annotations

import random
from collections.abc import Sequence

from flarec.base.generation import GenerationOptions
from flarec.decode import Generation

from .decoding import engine_of, near_tie, random_sampling, written
from .inputs import random_tokens
from .subject import Result, Subject

BATCH, OTHER_BATCH = 32, 5
"""Requests that share forwards; two counts, because sums round as their numbers of rows decide."""


def ar_trust_up_to_ties(subject: Subject, cases: int = 200, *, new_tokens: int = 24) -> Result:
    """Check 4 in the subject's own dtype: texts of AR-Trust and of causal decoding with the same seeds, greedy and
    sampled, branches. A first difference is a tie if logits within the measured error lead to both tokens.

    The floor is what causal decoding differs from itself, run with another number of requests at a time: ties are in
    the dtype, not in the mode. The difference counts the texts of AR-Trust that no tie explains.
    """
    rng = random.Random(subject.seed + 4)
    prompts = [random_tokens(rng, subject, rng.randint(1, 12)) for _ in range(cases)]
    settings = [random_sampling(rng) for _ in range(cases)]
    engine = engine_of(subject, subject.readouts[0])
    plain = engine.generate(prompts, settings, mode="causal", batch=BATCH, max_new_tokens=new_tokens)
    again = engine.generate(prompts, settings, mode="causal", batch=OTHER_BATCH, max_new_tokens=new_tokens)
    trusted = engine.generate(
        prompts, settings, mode="ar-trust", drafts="branches", batch=BATCH, max_new_tokens=new_tokens
    )
    ties, faults = differences(subject, prompts, settings, plain, trusted)
    floor, unexplained = differences(subject, prompts, settings, plain, again)
    forwards = sum(generation.forwards for generation in trusted)
    notes = [
        f"{cases} texts: {cases - ties - len(faults)} equal, {ties} part at a near tie, {len(faults)} without one",
        f"causal against causal, {BATCH} and {OTHER_BATCH} at a time: {floor} part at a near tie, "
        f"{len(unexplained)} without one",
    ]
    name = str(subject.decode.dtype).removeprefix("torch.")
    compared = f"{cases} texts, {cases * new_tokens / forwards:.2f} tokens per forward"
    return Result(
        4, f"AR-Trust = causal, {name}", compared, float(len(faults)), 0.0, not faults, (*notes, *faults[:3])
    )


def differences(
    subject: Subject,
    prompts: Sequence[list[int]],
    settings: Sequence[GenerationOptions],
    left: Sequence[Generation],
    right: Sequence[Generation],
) -> tuple[int, list[str]]:
    """How many texts part at a near tie, and a sentence for each other one."""
    ties, faults = 0, []
    for prompt, setting, a, b in zip(prompts, settings, left, right, strict=True):
        if a.token_ids == b.token_ids:
            continue
        if near_tie(subject, prompt, setting, a.token_ids, b.token_ids):
            ties += 1
        else:
            faults.append(f"{written(setting)}: {a.mode} {a.token_ids}, {b.mode} {b.token_ids}")
    return ties, faults
