"""Slow decoders written from docs/semantics.md: no cache, no batch, Python numbers in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from flarec.base.generation import GenerationOptions

from .fake_model import FakeModel

WORD = 2**64


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def uniform(seed: int, position: int, token: int) -> float:
    """The counter hash on Python integers; not rounded to float32."""
    stride = 0x9E3779B97F4A7C15
    row = mix((mix((seed + stride) % WORD) + position * stride) % WORD)
    word = mix((row + (token + 1) * stride) % WORD)
    return (2 * (word >> 24) + 1) / 2**41


def gumbel(seed: int, position: int, token: int) -> float:
    return -math.log(-math.log1p(-uniform(seed, position, token)))


def law(
    logits: Sequence[float] | np.ndarray, params: GenerationOptions, suppress: Collection[int]
) -> dict[int, float]:
    """Token -> probability after temperature, top-k, top-p."""
    scale = params.temperature or 1.0
    ids = sorted((i for i in range(len(logits)) if i not in suppress), key=lambda i: (-float(logits[i]), i))
    if params.top_k:
        ids = ids[: params.top_k]
    top = float(logits[ids[0]])
    weights = [math.exp((float(logits[i]) - top) / scale) for i in ids]
    kept: dict[int, float] = {}
    reached = 0.0
    for token, weight in zip(ids, weights, strict=True):
        if kept and params.top_p < 1 and reached >= params.top_p * sum(weights):
            break
        kept[token] = weight
        reached += weight
    return {token: weight / reached for token, weight in kept.items()}


def pick(
    logits: Sequence[float] | np.ndarray, params: GenerationOptions, position: int, suppress: Collection[int]
) -> tuple[int, float]:
    """The token for `position` and its probability."""
    probability = law(logits, params, suppress)

    def score(token: int) -> float:
        return float(logits[token]) + params.temperature * gumbel(params.seed, position, token)

    token = max(sorted(probability), key=score)
    return token, probability[token]


@dataclass
class Oracle:
    """What a decoder must return. written: where tokens come from, of those too that an end drops."""

    tokens: list[int]
    reason: str
    forwards: int
    histogram: Counter[int]
    written: list[str]

    @property
    def origins(self) -> list[str]:
        return self.written[: len(self.tokens)]

    def accepted(self) -> list[int]:
        return [self.histogram[i] for i in range(max(self.histogram, default=-1) + 1)]


def end(tokens: list[int], eos: Collection[int], limit: int) -> tuple[list[int], str] | None:
    """The tokens up to the first EOS or the limit, and why; None if neither is reached."""
    for index, token in enumerate(tokens):
        if token in eos:
            return tokens[: index + 1], "eos"
        if index + 1 == limit:
            return tokens[: index + 1], "length"
    return None


def causal(
    model: FakeModel, prompt: list[int], params: GenerationOptions, eos: Collection[int], limit: int
) -> Oracle:
    tokens: list[int] = []
    while True:
        sequence = prompt + tokens
        tokens.append(pick(model.clean(sequence), params, len(sequence), [model.mask])[0])
        done = end(tokens, eos, limit)
        if done is not None:
            return Oracle(*done, len(tokens), Counter(), ["clean"] * len(tokens))


def ar_trust(
    model: FakeModel,
    prompt: list[int],
    params: GenerationOptions,
    eos: Collection[int],
    limit: int,
    size: int,
    readout: str,
    branches: bool,
) -> Oracle:
    """Tokens from `causal` without end; what is simulated here is how many each forward yields."""
    stream = list(prompt)
    while len(stream) < len(prompt) + limit + size + 1:
        stream.append(pick(model.clean(stream), params, len(stream), [model.mask])[0])
    known = len(prompt) + 1  # prompt and emitted tokens; the last one is pending
    anchor: int | None = len(prompt)
    forwards, histogram, origins = 1, Counter[int](), ["clean"]
    while True:
        done = end(stream[len(prompt) : known], eos, limit)
        if done is not None:
            return Oracle(*done, forwards, histogram, origins)
        accepted, drafts = 0, 0
        if anchor is not None:
            assert anchor == known - 1
            drafts = size
            block = [model.mask] * size
            for offset in range(size):
                logits = model.noisy(stream[:anchor], block, offset, readout)
                target = anchor + offset + 1
                if pick(logits, params, target, [model.mask])[0] != stream[target]:
                    break
                accepted += 1
        forwards += 1
        histogram[accepted] += 1
        origins += ["accepted"] * accepted + ["corrected" if accepted < drafts else "clean"]
        known += accepted + 1
        anchor = known - 1 if branches or accepted == drafts else None


def elastic(
    model: FakeModel,
    prompt: list[int],
    params: GenerationOptions,
    eos: Collection[int],
    limit: int,
    size: int,
    threshold: float,
) -> Oracle:
    """A step reads everything before it anew: the clean row's token, then drafts as far as horizon and threshold go."""
    tokens: list[int] = []
    forwards, histogram, origins = 0, Counter[int](), list[str]()
    while True:
        prefix, suppress = prompt + tokens, [model.mask]
        tokens = [*tokens, pick(model.clean(prefix), params, len(prefix), suppress)[0]]
        taken = 0
        while taken < model.horizon(prefix, size):
            logits = model.noisy(prefix, [model.mask] * size, taken, "causal")
            token, confidence = pick(logits, params, len(prefix) + 1 + taken, suppress)
            if confidence < threshold:
                break
            tokens.append(token)
            taken += 1
        forwards += 1
        histogram[taken] += 1
        origins += ["clean"] + ["unverified"] * taken
        done = end(tokens, eos, limit)
        if done is not None:
            return Oracle(*done, forwards, histogram, origins)


def confident(guesses: dict[int, tuple[int, float]], readout: str, threshold: float) -> set[int]:
    """Which masked offsets of a block a step fills. guesses: a token and its confidence for each of them."""
    if readout == "causal":
        stop = next((offset for offset in sorted(guesses)[1:] if guesses[offset][1] < threshold), max(guesses) + 1)
        return {offset for offset in guesses if offset < stop}
    best = max(sorted(guesses), key=lambda offset: guesses[offset][1])
    return {best} | {offset for offset, (_, confidence) in guesses.items() if confidence >= threshold}


def diffusion_trust(
    model: FakeModel,
    prompt: list[int],
    params: GenerationOptions,
    eos: Collection[int],
    limit: int,
    size: int,
    readout: str,
    threshold: float,
    steps: int,
    rows: list[np.ndarray] | None = None,
) -> Oracle:
    """rows: gets the logits that chose each token, of whole blocks."""
    tokens: list[int] = []
    forwards, histogram = 0, Counter[int]()
    while True:
        prefix = prompt + tokens
        block = [model.mask] * size
        chose: dict[int, np.ndarray] = {}
        hidden = set(range(size))
        for step in range(steps):
            forwards += 1
            guesses = {}
            for offset in hidden:
                if offset == 0:
                    logits: np.ndarray = model.clean(prefix)
                else:
                    logits = model.noisy(prefix, block, offset - 1, readout)
                guesses[offset] = pick(logits, params, len(prefix) + offset, [model.mask])
                chose[offset] = logits
            chosen = set(hidden) if step == steps - 1 else confident(guesses, readout, threshold)
            for offset in chosen:
                block[offset] = guesses[offset][0]
            hidden -= chosen
            histogram[len(chosen)] += 1
            final = size if not hidden else min(hidden)
            done = end(tokens + block[:final], eos, limit)
            if rows is not None and (done is not None or not hidden):
                rows += [chose[offset] for offset in range(final)]
            if done is not None:
                whole = ["clean" if place % size == 0 else "unverified" for place in range(len(done[0]))]
                return Oracle(*done, forwards, histogram, whole)
            if not hidden:
                break
        tokens += block
