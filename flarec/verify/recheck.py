"""Invariant 11 of docs/semantics.md section 5: with a recheck of 1 every mode gives the text of causal decoding."""

from __future__ import annotations

import random
from dataclasses import replace

from flarec.decode import Engine

from .decoding import MOST_POSITIONS, near_tie, random_sampling, written
from .inputs import random_tokens
from .subject import Result, Subject

THRESHOLDS = (0.0, 0.5)
"""Confidence above which tokens of noisy rows are taken: all, so that most are taken back, and some."""


def recheck_is_causal(subject: Subject, cases: int = 4, *, new_tokens: int = 16) -> Result:
    """Check 12: Diffusion-Trust, and elastic decoding of a checkpoint with a horizon head, give with a recheck of 1 the
    tokens of causal decoding with the same seed, greedy and sampled. Near ties as in invariant 4."""
    assert subject.rechecked
    rng = random.Random(subject.seed + 12)
    prompts = [random_tokens(rng, subject, rng.randint(1, 12)) for _ in range(cases)]
    settings = [random_sampling(rng) for _ in range(cases)]
    engine = _engine(subject)
    causal = engine.generate(prompts, settings, mode="causal", max_new_tokens=new_tokens)
    compared, excused, notes = 0, 0, list[str]()
    for mode in subject.rechecked:
        for threshold in THRESHOLDS:
            each = [replace(setting, mode=mode, recheck=1.0, threshold=threshold) for setting in settings]
            found = engine.generate(prompts, each, max_new_tokens=new_tokens)
            for prompt, setting, a, b in zip(prompts, settings, causal, found, strict=True):
                compared += 1
                if a.token_ids == b.token_ids:
                    continue
                if near_tie(subject, prompt, setting, a.token_ids, b.token_ids):
                    excused += 1
                else:
                    case = f"{mode}, threshold {threshold}, {written(setting)}"
                    notes.append(f"{case}: causal {a.token_ids}, rechecked {b.token_ids}")
    text = f"{compared} texts of {' and '.join(subject.rechecked)}" + (f", {excused} with a near tie" * (excused > 0))
    passed = not notes and excused <= compared // 100
    return Result(12, "a recheck of 1 = causal", text, float(len(notes)), 0.0, passed, tuple(notes[:3]))


def _engine(subject: Subject) -> Engine:
    """Decodes in all modes that have a recheck; no token ends a text."""
    elastic = subject.elastic
    readouts: dict[str, str] = {mode: readout for mode, readout in subject.rechecked.items() if mode != "elastic"}
    return Engine(
        subject.decode, mask_token_id=subject.mask_token_id, block_size=subject.block_size,
        readouts={"ar-trust": "causal", **readouts}, eos_ids=(), max_positions=MOST_POSITIONS,
        suppress=subject.suppress, noise_ids=subject.noise_ids, horizon=None if elastic is None else lambda: elastic,
    )
