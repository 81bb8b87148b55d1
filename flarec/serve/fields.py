"""The fields of a request. What is not declared here, or not with a value that has an effect, is refused by its name.

A field that is null counts as absent. `mode`, `drafts`, `threshold`, `denoising_steps`, `recheck`, `top_k` and
`chat_template_kwargs` are not OpenAI's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from flarec.base.fields import LARGEST, shown
from flarec.base.generation import HOTTEST, Drafts, Mode
from flarec.decode.request import MOST_LOGPROBS

from .refusals import HttpRefusal

MOST_CHOICES = 128
MOST_PROMPTS = 1024
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_MESSAGES = 10_000
UNIONS = {
    "prompt": f"give a text, up to {MOST_PROMPTS} texts, token ids, or up to {MOST_PROMPTS} lists of these",
    "stop": f"give up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters",
}
_UNION_TAGS = {"str", "int", "bool", "float", "dict", "tuple"}

Whole = Annotated[int, Field(ge=1, le=LARGEST)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Token = Annotated[int, Field(ge=0, le=LARGEST)]
Zero = Annotated[float, Field(ge=0, le=0)]
"""A number that has no effect; others are not supported."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None


class Sampling(_Strict):
    """What completions and chats have in common."""

    model: str
    max_tokens: Whole | None = None
    temperature: Annotated[float, Field(ge=0, le=HOTTEST)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=LARGEST)] | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    mode: Mode | None = None
    drafts: Drafts | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    denoising_steps: Whole | None = None
    recheck: Annotated[float, Field(ge=0, le=1)] | None = None
    user: str | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_in_stream(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @field_validator("stream_options")
    @classmethod
    def _belong_to_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("stream_options is for requests with stream = true")
        return value


class CompletionFields(Sampling):
    """Of `/v1/completions`. prompt: text, texts, token ids, or lists of these."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Function(_Strict):
    name: str
    arguments: str


class ToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None


class Message(_Strict):
    """One turn. Content in parts is joined with line breaks."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None


class ToolFunction(_Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: ToolFunction


class ResponseFormat(_Strict):
    type: Literal["text"]


class ChatFields(Sampling):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=1024)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered(self) -> list[Tool]:
        """Those that the model may use."""
        return list(self.tools or ()) if self.tool_choice != "none" else []

    @property
    def functions(self) -> frozenset[str]:
        return frozenset(tool.function.name for tool in self.offered)

    @field_validator("top_logprobs")
    @classmethod
    def _belong_to_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("top_logprobs is for requests with logprobs = true")
        return value

    @field_validator("max_completion_tokens")
    @classmethod
    def _says_what_max_tokens_says(cls, value: int | None, info: ValidationInfo) -> int | None:
        if len({value, info.data.get("max_tokens")} - {None}) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return value


Fields = TypeVar("Fields", CompletionFields, ChatFields)


def parse(kind: type[Fields], body: bytes) -> Fields:
    """The fields of a JSON body. Raises `HttpRefusal` that names the first field which cannot be used."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


WITHOUT_EFFECT = ("frequency_penalty", "presence_penalty", "logit_bias", "best_of", "echo", "response_format")
"""Fields that are taken with the value that changes nothing."""


def _refusal(error: ValidationError) -> HttpRefusal:
    first = error.errors(include_url=False, include_context=False)[0]
    for other in error.errors(include_url=False, include_context=False):
        if other["type"] == "extra_forbidden":  # a union reports every member: a name that nobody knows says most
            first = other
            break
    if first["type"] == "json_invalid":
        return HttpRefusal(400, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if not first["loc"]:
        return HttpRefusal(400, "the body is no JSON object; give one")
    name = ".".join(_names(first["loc"], first["type"] == "extra_forbidden"))
    if first["type"] == "extra_forbidden":
        return HttpRefusal(400, f"the field '{shown(name)[1:-1]}' is unknown or not supported", param=shown(name)[1:-1])
    if first["type"] == "missing":
        return HttpRefusal(400, f"the field '{name}' is missing", param=name)
    if first["type"] == "value_error":
        return HttpRefusal(400, first["msg"].removeprefix("Value error, "), param=name)
    top = name.partition(".")[0]
    if top in WITHOUT_EFFECT:
        return HttpRefusal(400, f"{top} is not supported with a value that has an effect; leave it out", param=name)
    wanted = UNIONS.get(top, first["msg"])  # of a union every member complains
    return HttpRefusal(400, f"{name} is {shown(first['input'])}: {wanted}", param=name)


def _names(path: tuple[str | int, ...], unknown: bool) -> list[str]:
    """A path without the members of unions in it. The first part is a field; the last one if it is unknown."""
    inner = path[1:-1] if unknown else path[1:]
    kept = [part for part in inner if isinstance(part, int) or _is_name(part)]
    return [str(part) for part in (path[0], *kept, *(path[-1:] if unknown and len(path) > 1 else ()))]


def _is_name(part: str) -> bool:
    return part not in _UNION_TAGS and not part.startswith(("list[", "constrained-", "function-", "nullable"))
