"""Texts that the checkpoint writes, with where each token comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flarec.api import Model, Output
from flarec.base.generation import GenerationOptions
from flarec.decode.request import Origin


@dataclass(frozen=True)
class Sample:
    """An answer.

    prompt   as it was given
    spans    (origin, text): joined they are the text. Tokens whose bytes make a character together are one span, of
             the last one's origin; tokens without text have none
    counts   tokens of each origin, those without text too
    """

    prompt: str
    mode: str
    temperature: float
    spans: tuple[tuple[Origin, str], ...]
    counts: dict[Origin, int]
    new_tokens: int
    forwards: int
    stop_reason: str

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.spans)


def samples_of(model: Model, prompts: Sequence[Any], options: GenerationOptions, *, chat: bool) -> list[Sample]:
    """What the model writes to prompts (texts, or conversations). Raises `GenerationError`."""
    outputs: list[Output] = model.generate(list(prompts), options, chat=chat)
    return [
        Sample(
            prompt=_shown(prompt), mode=output.mode, temperature=options.temperature,
            spans=coloured(model.decode, output.token_ids, output.origins), counts=dict(Counter(output.origins)),
            new_tokens=output.new_tokens, forwards=output.forwards, stop_reason=output.stop_reason,
        )
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def coloured(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int], origins: Sequence[Origin]
) -> tuple[tuple[Origin, str], ...]:
    """The text of all tokens in spans of one origin each."""
    text, spans, shown = decode(tokens), list[tuple[Origin, str]](), 0
    for count, origin in enumerate(origins, 1):
        known = text if count == len(tokens) else decode(tokens[:count])
        if len(known) <= shown or not text.startswith(known):
            continue  # no text of its own, or bytes of a character that is not complete
        part, shown = known[shown:], len(known)
        if spans and spans[-1][0] == origin:
            part = spans.pop()[1] + part
        spans.append((origin, part))
    return tuple(spans)


def _shown(prompt: Any) -> str:
    """A conversation as a line per turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role')}: {turn.get('content') or ''}" for turn in prompt)
