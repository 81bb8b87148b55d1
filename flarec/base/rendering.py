"""A conversation through a tokenizer's chat template, in the first form of it that the template takes.

Tool calls have two forms that templates expect, arguments as an object and as JSON text, and a turn that is nothing but
calls may have no content or an empty one. Which one a template takes shows when it is tried: the form is chosen on the
whole conversation, and the parts of it are rendered in the same form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateSyntaxError

from ..errors import first_line
from .messages import BadRecord, Message, arguments_of, with_text_arguments

RESERVED = frozenset((
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding",
    "truncation", "max_length", "tokenizer_kwargs", "sanitize_control_tokens",
))


def render(
    tokenizer: Any, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False,
    template: str | None = None, options: Mapping[str, Any] | None = None,
) -> str:
    """The text of messages that are in a form that the template takes. Raises `BadRecord`.

    prompt: with what opens the assistant's turn behind it. template: instead of the tokenizer's own. options: variables
    of the template.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, chat_template=template,
            **(options or {}),
        )
    except TemplateSyntaxError as error:
        raise BadRecord(f"the chat template is none: {first_line(error)} in its line {error.lineno}") from None
    except Exception as error:  # whatever a template raises for messages it does not like
        raise BadRecord(f"the chat template rejects the messages ({first_line(error)})") from None
    if not isinstance(text, str):
        raise BadRecord("the chat template makes no text of the messages")
    return text


def rendered(
    tokenizer: Any, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False,
    options: Mapping[str, Any] | None = None,
) -> tuple[list[Message], str]:
    """The messages in the form that the template takes, and their text. Raises `BadRecord` with its first complaint."""
    first: BadRecord | None = None
    for form in _forms(messages):
        try:
            text = render(tokenizer, form, tools, prompt=prompt, options=options)
        except BadRecord as error:
            first = first or error
            continue
        if any(arguments and str(arguments) in text for arguments in arguments_of(form)):
            first = first or BadRecord("the chat template prints the arguments of a tool call as Python, not as JSON")
            continue
        return form, text
    assert first is not None
    raise first


def _forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    yield list(messages)
    if not any("tool_calls" in message for message in messages):
        return
    filled = [message if "content" in message else {**message, "content": ""} for message in messages]
    yield with_text_arguments(messages)
    yield filled
    yield with_text_arguments(filled)


def template_of(tokenizer: Any, tools: Any = None) -> str:
    """The template that a conversation with these tools is rendered with, of several the one that transformers takes.

    Raises `BadRecord` if there is none, or if there are several and none is the default.
    """
    templates = getattr(tokenizer, "chat_template", None)
    if not templates:
        raise BadRecord("the tokenizer has no chat template")
    if isinstance(templates, Mapping) and "default" not in templates and not (tools and "tool_use" in templates):
        raise BadRecord(
            f"the tokenizer has the chat templates {', '.join(sorted(templates))} and none of them is the default; "
            "keep one of them as chat_template.jinja"
        )
    template = tokenizer.get_chat_template(None, tools)
    assert isinstance(template, str)
    return template


def check_options(value: Any) -> dict[str, Any]:
    """A record's `chat_template_kwargs`. Raises `BadRecord`."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise BadRecord("chat_template_kwargs is not an object")
    if taken := sorted(RESERVED & value.keys()):
        raise BadRecord(f"chat_template_kwargs sets {taken[0]}, which is no variable of a template")
    return dict(value)

