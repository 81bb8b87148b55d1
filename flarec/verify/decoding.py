"""Invariants of decoding with caches: 3 (split = whole), 4 (AR-Trust = causal), 5 (no trace), 6 (transformers)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.base.generation import HEADLESS, GenerationOptions
from flarec.decode import Engine
from flarec.decode.sampling import SamplingRows, choose
from flarec.ir.program import Program
from flarec.layout import build_layout

from .inputs import all_logits, random_tokens
from .places import compare_texts, compare_with_source
from .replay import Replay, compare_caches
from .subject import Comparison, Result, Subject

MOST_POSITIONS = 4096
NEAR_TIE_TRIALS = 64
TIES_AT_ONCE = 16
"""Texts that share forwards while their logit error is measured."""
ONE_BY_ONE = 64
"""Tokens at the end of a text that are read one by one for that."""


def split_is_whole(subject: Subject, cases: int = 4) -> Result:
    """Invariant 3: prefill in pieces and step by step gives the logits and states of one pass."""
    rng = random.Random(subject.seed + 3)
    comparison, count = Comparison(), 0
    for _ in range(cases):
        lengths = [rng.randint(6, 20) for _ in range(2)]
        tokens = [random_tokens(rng, subject, length) for length in lengths]
        whole, split = Replay(subject, tokens), Replay(subject, tokens)
        complete = whole.feed(lengths)
        pieces: list[list[Tensor]] = [[], []]
        while any(split.left()):
            counts = [min(left, rng.randint(0, 5)) for left in split.left()]
            if any(counts):
                for request, logits in enumerate(split.feed(counts)):
                    pieces[request].append(logits)
        for request, length in enumerate(lengths):
            with torch.no_grad():
                row = torch.tensor([tokens[request]])
                trained = all_logits(subject.train, row, build_layout([[length]], [[]]))[0]
            for decoded in (complete[request], torch.cat(pieces[request])):
                compare_texts(comparison, subject, tokens[request], trained, decoded)
        whole.flush()
        split.flush()
        count += compare_caches(comparison, whole, split)
    return comparison.result(3, "prefill + steps = one pass", f"logits of {2 * cases} texts, {count} caches")


def ar_trust_is_causal(
    subject: Subject,
    cases: int = 8,
    *,
    drafts: Sequence[str] = HEADLESS,
    new_tokens: int = 24,
    reference: Program | None = None,
) -> Result:
    """Invariant 4: AR-Trust gives the tokens of causal decoding with the same seed, greedy and sampled.

    reference: the program that decodes causally; default: the same one.

    Rounding differs between forwards with different row counts: a first difference is excused if the choice between the
    two tokens changes within the logit error, which is measured there. The difference counts the texts without excuse.
    """
    rng = random.Random(subject.seed + 4)
    prompts = [random_tokens(rng, subject, rng.randint(1, 12)) for _ in range(cases)]
    settings = [random_sampling(rng) for _ in range(cases)]
    compared, excused, forwards = 0, 0, 0
    notes: list[str] = []
    for readout in subject.readouts:
        engine = engine_of(subject, readout)
        causal = (causal_engine(reference) if reference else engine).generate(
            prompts, settings, mode="causal", max_new_tokens=new_tokens
        )
        for scheme in drafts:
            trusted = engine.generate(prompts, settings, mode="ar-trust", drafts=scheme, max_new_tokens=new_tokens)
            for prompt, setting, a, b in zip(prompts, settings, causal, trusted, strict=True):
                compared, forwards = compared + 1, forwards + b.forwards
                if a.token_ids == b.token_ids:
                    continue
                if near_tie(subject, prompt, setting, a.token_ids, b.token_ids):
                    excused += 1
                else:
                    case = f"{readout}, {scheme}, {written(setting)}"
                    notes.append(f"{case}: causal {a.token_ids}, AR-Trust {b.token_ids}")
    text = f"{compared} texts, {compared * new_tokens / forwards:.2f} tokens per forward"
    text += f", {excused} with a near tie" if excused else ""
    passed = not notes and excused <= compared // 100
    return Result(4, "AR-Trust = causal", text, float(len(notes)), 0.0, passed, tuple(notes[:3]))


def engine_of(subject: Subject, readout: str) -> Engine:
    """Drafts and verifies with that readout; no token ends a text."""
    return Engine(
        subject.decode, mask_token_id=subject.mask_token_id, block_size=subject.block_size,
        readouts={"ar-trust": readout}, eos_ids=(), max_positions=MOST_POSITIONS, suppress=subject.suppress,
        noise_ids=subject.noise_ids,
    )


def causal_engine(program: Program) -> Engine:
    """Of a program that may have no mask token."""
    return Engine(program, mask_token_id=None, block_size=None, readouts={}, eos_ids=(), max_positions=MOST_POSITIONS)


def random_sampling(rng: random.Random) -> GenerationOptions:
    """Greedy or sampled, with and without truncation."""
    return GenerationOptions(
        temperature=rng.choice([0.0, 0.5, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 3, 40]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.5]),
        seed=rng.randrange(1 << 62),
    )


def written(setting: GenerationOptions) -> str:
    return f"T {setting.temperature}, top-k {setting.top_k}, top-p {setting.top_p}, seed {setting.seed}"


@dataclass(frozen=True)
class Parting:
    """Two continuations of a prompt under the same options that are not equal."""

    prompt: list[int]
    setting: GenerationOptions
    a: list[int]
    b: list[int]

    @property
    def first(self) -> int:
        """The place of the first difference."""
        return next(i for i, (x, y) in enumerate(zip(self.a, self.b, strict=True)) if x != y)


def near_tie(subject: Subject, prompt: list[int], setting: GenerationOptions, a: list[int], b: list[int]) -> bool:
    """True if logits within the logit error of each other lead to both tokens of the first difference."""
    return near_ties(subject, [Parting(prompt, setting, a, b)])[0]


def near_ties(subject: Subject, partings: Sequence[Parting]) -> list[bool]:
    """`near_tie` of each, some at a time.

    The logit error is measured at the first difference: the text in one pass against the text in steps of a token (of a
    long one all but its last `ONE_BY_ONE` tokens in one pass), at least a rounding step of the largest logit; the bound
    is four times that.
    """
    found = []
    for start in range(0, len(partings), TIES_AT_ONCE):
        group = partings[start : start + TIES_AT_ONCE]
        tokens = [[*parting.prompt, *parting.a[: parting.first]] for parting in group]
        whole = [rows[-1] for rows in Replay(subject, tokens).feed([len(row) for row in tokens])]
        for parting, one, other in zip(group, whole, _last_in_steps(subject, tokens), strict=True):
            found.append(_is_near(subject, parting, one.float(), other.float(), torch.finfo(one.dtype).eps))
    return found


def _last_in_steps(subject: Subject, tokens: Sequence[list[int]]) -> list[Tensor]:
    """[V] logits behind each text, which was read in steps."""
    replay, last = Replay(subject, tokens), [torch.empty(0)] * len(tokens)
    counts = [max(0, left - ONE_BY_ONE) for left in replay.left()]
    while any(replay.left()):
        if any(counts):
            for request, rows in enumerate(replay.feed(counts)):
                last[request] = rows[-1] if len(rows) else last[request]
        counts = [min(1, left) for left in replay.left()]
    return last


def _is_near(subject: Subject, parting: Parting, whole: Tensor, last: Tensor, step: float) -> bool:
    error = 4 * max(float((last - whole).abs().max()), step * float(whole.abs().max()))
    noise = torch.rand(NEAR_TIE_TRIALS, len(whole), generator=torch.Generator().manual_seed(0)) * 2 - 1
    trials = SamplingRows.build([parting.setting] * NEAR_TIE_TRIALS, last.device)
    position = len(parting.prompt) + parting.first
    positions = torch.full((NEAR_TIE_TRIALS,), position, device=last.device)
    chosen, _ = choose(last + error * noise.to(last.device), trials, positions, subject.suppress)
    return {parting.a[parting.first], parting.b[parting.first]} <= set(chosen.tolist())


def rejected_draft_leaves_no_trace(subject: Subject, cases: int = 4) -> Result:
    """Invariant 5: after a rejected draft, caches and next logits equal those of a run that never saw it."""
    rng = random.Random(subject.seed + 5)
    comparison, count = Comparison(), 0
    for _ in range(cases):
        known = [rng.randint(3, 10) for _ in range(2)]
        accepted = [rng.randint(1, 3) for _ in range(2)]
        tokens = [random_tokens(rng, subject, n + a + 2) for n, a in zip(known, accepted, strict=True)]
        wrong = [random_tokens(rng, subject, rng.randint(1, subject.block_size)) for _ in range(2)]
        plain, drafted = Replay(subject, tokens), Replay(subject, tokens)
        pieces: list[list[Tensor]] = [[], [], [], []]
        for step in ("prompt", "verify", "next"):
            counts = {"prompt": known, "verify": accepted, "next": [2, 2]}[step]
            seen, beside = plain.feed(counts), drafted.feed(counts, wrong if step == "verify" else None)
            for place, logits in zip(pieces, [*seen, *beside], strict=True):
                place.append(logits)
        for request in range(2):
            a, b = (torch.cat(pieces[request + 2 * side]) for side in range(2))
            compare_texts(comparison, subject, tokens[request], a, b)
        plain.flush()
        drafted.flush()
        count += compare_caches(comparison, plain, drafted)
    return comparison.result(5, "rejected drafts leave no trace", f"logits of {2 * cases} texts, {count} caches")


def opens_in_transformers(subject: Subject, cases: int = 3) -> Result:
    """Invariant 6: transformers alone gives the causal logits that flarec decodes with, token by token."""
    rng = random.Random(subject.seed + 6)
    comparison, count = Comparison(), 0
    for _ in range(cases):
        tokens = random_tokens(rng, subject, rng.randint(8, 24))
        replay = Replay(subject, [tokens])
        ours = torch.cat([replay.feed([1])[0] for _ in tokens])
        compare_with_source(comparison, subject, tokens, ours)
        count += len(tokens)
    return comparison.result(6, "opens in transformers", f"logits of {count} causal decode steps")
