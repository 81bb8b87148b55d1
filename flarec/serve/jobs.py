"""A generation that a client asked for, and the news about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter as clock

from flarec.base.generation import GenerationOptions
from flarec.decode import TextStream
from flarec.decode.request import Request, TokenLogprob

from .refusals import HttpRefusal


@dataclass(eq=False)
class Job:
    """One choice: it waits, runs, and ends with a finish reason or an error.

    logprobs  as in `Engine.add`
    told      tokens whose log-probabilities the client has
    held      text of the step that ended it
    """

    prompt: list[int]
    options: GenerationOptions
    logprobs: int | None = None
    given: float = field(default_factory=clock)
    request: Request | None = None
    text: TextStream | None = None
    first: float | None = None
    told: int = 0
    held: str = ""
    ended: bool = False


@dataclass(frozen=True)
class News:
    """What happened to a job in a step.

    text      that may be shown, without what may still become a stop string or a character
    tokens    how many there are so far
    chosen    log-probabilities of the new ones, with their ids
    finish    "stop" or "length" if the job ended, "cancelled" if somebody ended it
    refusal   why it is not served
    """

    job: Job
    text: str = ""
    tokens: int = 0
    chosen: Sequence[tuple[int, TokenLogprob]] = ()
    finish: str | None = None
    refusal: HttpRefusal | None = None
