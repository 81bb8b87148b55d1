"""One request on the host: its tokens so far, when it ends, and what is reported about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from flarec.base.generation import GenerationOptions
from flarec.errors import GenerationError

Array: TypeAlias = np.ndarray[Any, Any]
Prompts: TypeAlias = Sequence[Sequence[int]] | Sequence[Tensor] | Sequence[Array] | Tensor | Array
"""Token ids of several prompts."""
StopCheck = Callable[[Sequence[int]], int | None]
OnTokens = Callable[[int, list[int]], None]
Origin = Literal["clean", "accepted", "corrected", "unverified"]
"""Where a new token comes from: "clean", the clean stream's own, where no draft was; "accepted", drafted, and what the
clean stream chose too; "corrected", the clean stream's in the place of a rejected draft, or of a token that a recheck
took back; "unverified", of a noisy row alone (elastic drafts that were taken, denoised positions), or kept by a recheck
though the clean stream chose another. Of causal, ar-trust and elastic each forward ends with one token that is clean or
corrected."""
MOST_LOGPROBS = 20
"""Alternatives per token of which a request may ask the log-probability."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a new token was, by the logits of the row that chose it (the clean one where a noisy one did too):
    before temperature, top-k and top-p, without the ids that are never generated.

    logprob  natural logarithm of its probability
    top      the most likely ids and theirs, in falling order
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @staticmethod
    def read(numbers: Sequence[float]) -> TokenLogprob:
        """From the numbers of `Rows.note`."""
        half = (len(numbers) + 1) // 2
        top = zip(map(int, numbers[1:half]), numbers[half:], strict=True)
        return TokenLogprob(numbers[0], tuple(top))


@dataclass(frozen=True)
class Generation:
    """What a request produced.

    token_ids    new tokens; the last one is EOS if stop_reason is "eos"
    mode         "causal", "ar-trust", "diffusion-trust" or "elastic"
    forwards     forward passes this request took part in; a prefill in chunks counts as one
    accepted     ar-trust: accepted[a] = steps after the prefill in which a drafts were accepted (a step without drafts
                 accepts 0); diffusion-trust: accepted[c] = denoising steps that committed c tokens; elastic:
                 accepted[a] = steps, the prefill among them, that took a drafts; both with a recheck: accepted[a] =
                 steps, the prefill among them, that kept a tokens of noisy rows, 0 where none was to be checked;
                 causal: empty
    seconds      wall time from when the request was given to its last token
    stop_reason  "eos", "stop" (the stop check), "length" or "cancelled"
    origins      where each of the new tokens comes from (`Origin`)
    taken_back   tokens that a recheck took back, with those that it dropped behind them
    """

    token_ids: list[int]
    mode: str
    forwards: int
    accepted: list[int]
    seconds: float
    stop_reason: str
    origins: list[Origin]
    taken_back: int = 0

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_forward(self) -> float:
        return self.new_tokens / self.forwards if self.forwards else 0.0


@dataclass(frozen=True)
class Stopping:
    """When a request ends, and who is told about its tokens.

    stop_check(new tokens so far) returns how many of them to keep if the request ends here, else None. It is called
    after every single token, so that the result does not depend on how many tokens a forward yields.
    """

    eos_ids: frozenset[int] = frozenset()
    stop_check: StopCheck | None = None
    on_tokens: OnTokens | None = None


@dataclass(eq=False)
class Request:
    """A request that waits, runs or has ended.

    index    its place in the caller's list, or how many were added before it
    limit    largest number of new tokens, >= 1
    options  complete
    logprobs how many alternatives per token are wanted with it; None: no log-probabilities
    ready    a note of its mode: how many drafts it has, whether its block is full, or how much of it the next step
             commits
    notes    log-probabilities of what the last step chose (`Rows.note`), until it emits
    chosen   those of `tokens`; empty unless they are wanted
    origins  of `tokens`
    offered  drafts that a step verified -> how many steps
    taken_back  tokens that a recheck took back, and those behind them
    undrafted  steps without drafts in a mode that drafts; in `histogram` and `offered` once it has ended
    failure  what ended it if an error did
    """

    index: int
    prompt: list[int]
    limit: int
    stopping: Stopping
    options: GenerationOptions
    logprobs: int | None = None
    ready: int = 0
    notes: list[list[float]] = field(default_factory=list)
    chosen: list[TokenLogprob] = field(default_factory=list)
    offered: dict[int, int] = field(default_factory=dict)
    taken_back: int = 0
    undrafted: int = 0
    failure: Exception | None = None
    tokens: list[int] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    forwards: int = 0
    histogram: dict[int, int] = field(default_factory=dict)
    stop_reason: str | None = None
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0

    @property
    def length(self) -> int:
        """Prompt and new tokens."""
        return len(self.prompt) + len(self.tokens)

    @property
    def finished(self) -> bool:
        return self.stop_reason is not None

    def fail(self, error: Exception) -> None:
        self.failure = error
        self.end("error")

    def end(self, reason: str) -> None:
        if self.undrafted:
            for counts in (self.histogram, self.offered):
                counts[0] = counts.get(0, 0) + self.undrafted
        self.stop_reason = reason
        self.seconds = time.perf_counter() - self.started

    def count(self, tokens: int, offered: int | None = None) -> None:
        """One more step that accepted (committed, took, kept) `tokens` tokens; of `offered` drafts, if it had any."""
        self.histogram[tokens] = self.histogram.get(tokens, 0) + 1
        if offered is not None:
            self.offered[offered] = self.offered.get(offered, 0) + 1

    def check(self, token: int) -> None:
        """Raise `GenerationError` for a token that could not be chosen (`sampling.UNCHOSEN`)."""
        if token < 0:
            raise GenerationError(
                f"the logits of prompt {self.index} are not finite after {len(self.tokens)} new tokens (NaN or "
                "infinity), so that no token can be chosen; check the weights, or compute in float32"
            )

    def emit(self, tokens: Sequence[int], origins: Sequence[Origin], place: int = 0) -> None:
        """Append final tokens up to the first reason to stop; what follows it is dropped. origins: of each of them;
        place: of the first of them among the step's notes."""
        assert self.stop_reason is None
        start = len(self.tokens)
        for index, (token, origin) in enumerate(zip(tokens, origins, strict=True), start=place):
            self.check(token)
            self.tokens.append(token)
            self.origins.append(origin)
            if self.logprobs is not None:
                self.chosen.append(TokenLogprob.read(self.notes[index]))
            reason = self._reason()
            if reason is not None:
                self.end(reason)
                break
        new = self.tokens[start:]
        if new and self.stopping.on_tokens is not None:
            self.stopping.on_tokens(self.index, new)

    def _reason(self) -> str | None:
        if self.tokens[-1] in self.stopping.eos_ids:
            return "eos"
        if self.stopping.stop_check is not None:
            keep = self.stopping.stop_check(self.tokens)
            if keep is not None:
                if not 0 <= keep <= len(self.tokens):
                    raise GenerationError(
                        f"the stop check asked to keep {keep} of {len(self.tokens)} tokens; return a number up to that"
                    )
                del self.tokens[keep:], self.chosen[keep:], self.origins[keep:]
                return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def generation(self) -> Generation:
        """What it produced. Raises what ended it if an error did."""
        if self.failure is not None:
            raise self.failure
        assert self.stop_reason is not None and self.options.mode is not None, "the request has not ended"
        accepted = [self.histogram.get(tokens, 0) for tokens in range(max(self.histogram, default=-1) + 1)]
        return Generation(
            list(self.tokens), self.options.mode, self.forwards, accepted, self.seconds, self.stop_reason,
            list(self.origins), self.taken_back,
        )
