"""Slow decoders with a recheck, written from docs/semantics.md section 4: no cache, no batch, numbers in float64."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from flarec.base.generation import GenerationOptions

from .fake_model import FakeModel
from .oracles import confident, end, gumbel, law, pick


@dataclass
class Rechecked:
    """One request. share: of the recheck. A `forward` commits `pending` as far as it is kept. kept: tokens of noisy
    rows, of every forward that looked at some."""

    model: FakeModel
    prompt: list[int]
    params: GenerationOptions
    eos: Collection[int]
    limit: int
    share: float
    committed: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    taken_back: int = 0
    forwards: int = 0
    kept: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.committed = list(self.prompt)
        self.sources: list[np.ndarray] = []  # logits that chose what is pending

    def choice(self, prefix: list[int]) -> int:
        return pick(self.model.clean(prefix), self.params, len(prefix), [self.model.mask])[0]

    def keeps(self, prefix: list[int], token: int) -> bool:
        logits, own = self.model.clean(prefix), self.choice(prefix)
        if token == own:
            return True
        if token not in law(logits, self.params, [self.model.mask]):
            return False
        t, seed, place = self.params.temperature, self.params.seed, len(prefix)
        gap = float(logits[token]) - float(logits[own])
        if t:
            gap = gap / t + gumbel(seed, place, token) - gumbel(seed, place, own)
        return math.exp(gap) > self.share

    def check(self) -> bool:
        """Commit and emit; whether something was taken back."""
        kept = 1
        while kept < len(self.pending) and self.keeps(self.committed + self.pending[:kept], self.pending[kept]):
            kept += 1
        for index in range(1, kept):
            prefix, token = self.committed + self.pending[:index], self.pending[index]
            if token == self.choice(prefix):
                self.emit(token, "accepted", self.model.clean(prefix))
            else:
                self.emit(token, "unverified", self.sources[index])
        back = kept < len(self.pending)
        self.kept.append(kept - 1)
        self.taken_back += len(self.pending) - kept
        self.committed += self.pending[:kept]
        clean = self.model.clean(self.committed)
        self.emit(self.choice(self.committed), "corrected" if back else "clean", clean)
        if back:
            self.pending, self.sources = [self.tokens[-1]], [clean]
        return back

    def emit(self, token: int, origin: str, row: np.ndarray) -> None:
        self.tokens.append(token)
        self.origins.append(origin)
        self.rows.append(row)

    @property
    def done(self) -> tuple[list[int], str] | None:
        return end(self.tokens, self.eos, self.limit)


def rechecked_trust(request: Rechecked, size: int, readout: str, threshold: float, steps: int) -> Rechecked:
    model, mask = request.model, request.model.mask
    block, hidden, step = [mask] * size, set(range(size)), 0
    chose = [model.clean([])] * size
    request.emit(request.choice(request.prompt), "clean", model.clean(request.prompt))
    while True:
        request.forwards += 1
        back = False
        if request.pending:
            back = request.check()
            block, hidden, step = [mask] * size, set(range(size)), 0
        if not back:
            request.pending = []
            prefix, guesses = request.committed, {}
            for offset in hidden:
                logits = model.clean(prefix) if offset == 0 else model.noisy(prefix, block, offset - 1, readout)
                guesses[offset] = pick(logits, request.params, len(prefix) + offset, [mask])
                chose[offset] = logits
            step += 1
            chosen = set(hidden) if step == steps else confident(guesses, readout, threshold)
            for offset in chosen:
                block[offset] = guesses[offset][0]
            hidden -= chosen
            shown = block[: min(hidden, default=size)]
            ends = [offset for offset, token in enumerate(shown) if token in request.eos]
            if ends or not hidden:
                request.pending = shown[: ends[0] + 1] if ends else shown
                request.sources = chose[: len(request.pending)]
        if request.done is not None:
            return request


def rechecked_elastic(request: Rechecked, size: int, threshold: float) -> Rechecked:
    model, mask = request.model, request.model.mask
    request.emit(request.choice(request.prompt), "clean", model.clean(request.prompt))
    while True:
        request.forwards += 1
        back = bool(request.pending) and request.check()
        taken = 0
        if not back:
            prefix = request.committed
            request.pending, request.sources = [request.tokens[-1]], [model.clean(prefix)]
            while taken < model.horizon(prefix, size):
                logits = model.noisy(prefix, [mask] * size, taken, "causal")
                token, confidence = pick(logits, request.params, len(prefix) + 1 + taken, [mask])
                if confidence < threshold:
                    break
                request.pending.append(token)
                request.sources.append(logits)
                taken += 1
        if request.done is not None:
            return request
