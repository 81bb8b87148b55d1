"""AR-Trust against causal decoding in another dtype than float32, where near ties go either way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from flarec.base.generation import GenerationOptions
from flarec.base.prompts import read_prompts
from flarec.decode import Generation
from flarec.decode.tokenizing import encode_prompt
from flarec.errors import UsageError

from .decoding import MOST_POSITIONS, Parting, engine_of, near_ties, random_sampling, written
from .inputs import random_tokens
from .subject import Result, Subject

BATCH, OTHER_BATCH = 32, 5
"""Requests that share forwards; two counts, because sums round as their numbers of rows decide."""
PIECE = 16
"""Tokens of a prompt that are read at a time in the second run, for the same reason: a CPU's sums do not depend on the
number of requests."""
TEXTS, NEW_TOKENS = 200, 24


def prompts_of(subject: Subject, path: Path, count: int, *, chat: bool) -> list[list[int]]:
    """Token ids of the first `count` prompts of a file, as `flarec generate` reads them. Raises `DataError`, or
    `UsageError` for a model without a tokenizer."""
    if subject.texts is None:
        raise UsageError("prompts need the model's tokenizer, which is not there; leave --prompts out")
    prompts = []
    for where, prompt in read_prompts(path):
        prompts.append(encode_prompt(subject.texts.tokenizer, prompt, chat=chat))
        if len(prompts[-1]) + NEW_TOKENS > MOST_POSITIONS:
            raise UsageError(f"{where}: the prompt has {len(prompts[-1]):,} tokens; give shorter ones")
        if len(prompts) == count:
            break
    return prompts


def ar_trust_up_to_ties(
    subject: Subject, cases: int = TEXTS, *, new_tokens: int = NEW_TOKENS, prompts: Sequence[list[int]] | None = None
) -> Result:
    """Check 4 in the subject's own dtype: texts of AR-Trust and of causal decoding with the same seeds, greedy and
    sampled, branches. A first difference is a tie if logits within the measured error lead to both tokens.

    prompts: token ids, instead of `cases` pieces of the subject's texts.

    The floor is what causal decoding differs from itself, run with another number of requests at a time, and prompts in
    pieces: ties are in the dtype, not in the mode. The difference counts the texts of AR-Trust that no tie explains.
    """
    rng = random.Random(subject.seed + 4)
    given = prompts if prompts is not None else [random_tokens(rng, subject, rng.randint(1, 12)) for _ in range(cases)]
    settings = [random_sampling(rng) for _ in given]
    engine = engine_of(subject, subject.readouts[0])
    plain = engine.generate(given, settings, mode="causal", batch=BATCH, max_new_tokens=new_tokens)
    again = engine.generate(
        given, settings, mode="causal", batch=OTHER_BATCH, prefill_chunk=PIECE, max_new_tokens=new_tokens
    )
    trusted = engine.generate(
        given, settings, mode="ar-trust", drafts="branches", batch=BATCH, max_new_tokens=new_tokens
    )
    ties, faults = differences(subject, given, settings, plain, trusted)
    floor, unexplained = differences(subject, given, settings, plain, again)
    texts, made = len(given), new_tokens * len(given) / sum(generation.forwards for generation in trusted)
    notes = [
        f"{texts} texts: {texts - ties - len(faults)} equal, {ties} part at a near tie, {len(faults)} without one",
        f"causal against causal, {BATCH} and {OTHER_BATCH} at a time, prompts whole and by {PIECE}: "
        f"{floor} part at a near tie, {len(unexplained)} without one",
    ]
    counts = {
        "texts": texts, "near_ties": ties, "without_tie": len(faults), "causal_near_ties": floor,
        "causal_without_tie": len(unexplained), "tokens_per_forward": made,
    }
    name = str(subject.decode.dtype).removeprefix("torch.")
    return Result(
        4, f"AR-Trust = causal, {name}", f"{texts} texts, {made:.2f} tokens per forward", float(len(faults)), 0.0,
        not faults, (*notes, *faults[:3]), counts,
    )


def differences(
    subject: Subject,
    prompts: Sequence[list[int]],
    settings: Sequence[GenerationOptions],
    left: Sequence[Generation],
    right: Sequence[Generation],
) -> tuple[int, list[str]]:
    """How many texts part at a near tie, and a sentence for each other one."""
    pairs = [
        (Parting(prompt, setting, a.token_ids, b.token_ids), f"{a.mode} {a.token_ids}, {b.mode} {b.token_ids}")
        for prompt, setting, a, b in zip(prompts, settings, left, right, strict=True)
        if a.token_ids != b.token_ids
    ]
    near = near_ties(subject, [parting for parting, _ in pairs])
    faults = [
        f"{written(parting.setting)}: {text}" for (parting, text), tie in zip(pairs, near, strict=True) if not tie
    ]
    return sum(near), faults
