"""From the fields of a request to token ids and options."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from typing import Any, Protocol

from flarec.base.fields import LARGEST, shown
from flarec.base.generation import GenerationOptions
from flarec.base.rendering import RESERVED
from flarec.decode import Engine
from flarec.decode.tokenizing import encode_prompt

from .fields import ChatFields, CompletionFields, Message, Sampling
from .refusals import HttpRefusal, about

SHORT = 16
"""New tokens of a completion that does not say how many; a chat goes on to the end of the context."""


class Served(Protocol):
    """The model that is served: `flarec.api.Model`."""

    tokenizer: Any

    @property
    def engine(self) -> Engine: ...

    def complete(self, options: GenerationOptions) -> GenerationOptions: ...

    def encode(self, prompt: Any, *, chat: bool = False) -> list[int]: ...

    def decode(self, tokens: Any) -> str: ...


def options_of(model: Served, fields: Sampling, limit: int) -> GenerationOptions:
    """What the fields say, the checkpoint's defaults where they say nothing; temperature 1 and a random seed as OpenAI
    has it. `limit`: new tokens, unless they say it. Raises `HttpRefusal`, also for another mode's fields."""
    given = GenerationOptions(
        mode=fields.mode,
        max_new_tokens=fields.max_tokens or limit,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_k=max(fields.top_k or 0, 0),
        top_p=1.0 if fields.top_p is None else fields.top_p,
        seed=secrets.randbelow(LARGEST) if fields.seed is None else fields.seed,
        stop=fields.stops,
        drafts=fields.drafts,
        threshold=fields.threshold,
        denoising_steps=fields.denoising_steps,
        recheck=fields.recheck,
    )
    with about("mode"):
        options = model.complete(given)
    for name in given.unread(str(options.mode)):
        raise HttpRefusal(400, f"{name} does nothing in mode {options.mode}; leave it out", param=name)
    return options


def choices_of(options: GenerationOptions, count: int) -> list[GenerationOptions]:
    """One per choice: choice i has the seed of the first one plus i."""
    return [replace(options, seed=(options.seed + index) % (LARGEST + 1)) for index in range(count)]


def completion_prompts(model: Served, fields: CompletionFields) -> list[list[int]]:
    """Token ids of every prompt. Raises `HttpRefusal`."""
    with about("prompt"):
        return [
            model.engine.read_prompt(model.encode(prompt) if isinstance(prompt, str) else prompt)
            for prompt in fields.prompts
        ]


def chat_prompt(model: Served, fields: ChatFields) -> list[int]:
    """Token ids of the conversation up to the turn that the model writes. Raises `HttpRefusal`."""
    options = dict(fields.chat_template_kwargs or {})
    if taken := sorted(RESERVED & options.keys()):
        name = f"chat_template_kwargs.{taken[0]}"
        raise HttpRefusal(400, f"the field '{name}' is the server's own; give variables of the template", param=name)
    tools = [tool.model_dump(exclude_none=True) for tool in fields.offered] or None
    messages = [turn(message) for message in fields.messages]
    with about("messages"):
        return model.engine.read_prompt(encode_prompt(model.tokenizer, messages, tools=tools, options=options))


def turn(message: Message) -> dict[str, Any]:
    """A message as `flarec.base.messages` reads it: parts of a text joined, nothing that is null."""
    found = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        found["content"] = "\n".join(part.text for part in message.content)
    if message.content is None and not message.tool_calls:
        raise HttpRefusal(400, f"a message of the {message.role} has no content", param="messages")
    for call in message.tool_calls or ():
        _check_arguments(call.function.arguments)
    return found


def _check_arguments(text: str) -> None:
    try:
        table = json.loads(text or "{}")
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise HttpRefusal(400, f"the arguments of a tool call are no JSON object: {shown(text)}", param="messages")
