"""Chat messages in the one form that templates take, from the forms in which data files hold them.

Accepted are role and content, ShareGPT's from and value, a message or the whole list as JSON text, content as parts of
text, tool calls (their arguments, and the tools themselves) as objects or as JSON text, and OpenAI's older
`function_call`. What a text model cannot read, an image for example, is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Keys of a record that may hold its messages; the first one that is there counts."""


class BadRecord(ValueError):
    """Why one record cannot be used; the reader adds file and line."""


ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool", "function_response": "tool", "function": "tool",
}
"""Names of roles in data files that no template knows by them. `developer` and others of a template stay."""
_STANDARD = ("system", "developer", "user", "assistant", "tool")
_CALL = "function_call"  # ShareGPT: a turn that is a call, its value JSON
_TEXT_PARTS = ("text", "input_text", "output_text")


class CallArguments(dict[str, Any]):
    """Arguments of a tool call that the file holds as JSON text, which some templates print as it is."""

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self.text = text


def messages_of(value: Any, what: str = "messages") -> list[Message]:
    """The messages of a record's field `what`. Raises `BadRecord` naming the message."""
    value = _as_rows(from_json(value))
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRecord(f"{what} is not a list with at least one message")
    return [_message(from_json(item), number) for number, item in enumerate(value, 1)]


def _as_rows(value: Any) -> Any:
    """A table of columns, as `datasets` keeps a sequence of objects, as its rows; anything else as it is."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    rows = zip(*value.values(), strict=True)
    return [{key: item for key, item in zip(value, row, strict=True) if item is not None} for row in rows]


def one_of(table: Mapping[str, Any], names: Sequence[str], where: str = "") -> str | None:
    """Of several names for one thing that under which a table holds it; None without any.

    Nothing and an empty value give way to another. Raises `BadRecord` if two hold different things: one would
    be dropped.
    """
    given = [name for name in names if table.get(name) is not None]
    filled = [name for name in given if table[name] not in ("", [], {})]
    for name in filled[1:]:
        if table[name] != table[filled[0]]:
            what = f"{where} has" if where else "has"
            raise BadRecord(f"{what} {filled[0]} and {name}, which are names for one thing and differ; remove one")
    return next(iter(filled or given), None)


def from_json(value: Any) -> Any:
    """What a text holds as JSON, objects and lists; everything else, and other text, as it is."""
    read = _parsed(innermost(value))
    return value if isinstance(read, str) else read


def innermost(value: Any) -> Any:
    """Of JSON text of JSON text the inner one."""
    while isinstance(value, str) and isinstance(read := _parsed(value), str) and read != value:
        value = read
    return value


def _parsed(value: Any) -> Any:
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[", '"')):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def tools_of(value: Any) -> list[Message] | None:
    """The tools of a record: a list of JSON schemas, one alone, or JSON text of either. Raises `BadRecord`."""
    value = from_json(value)
    if value is None or value == [] or (isinstance(value, str) and value.strip() in ("", "null")):
        return None
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list):
        raise BadRecord("tools is neither a list of JSON schemas nor JSON text of one")
    return [_tool(from_json(item), number) for number, item in enumerate(value, 1)]


def tool_name(tool: Mapping[str, Any]) -> str | None:
    """The name of a tool or of a call of one, wherever it stands; None without one."""
    inner = tool.get("function")
    name = inner.get("name") if isinstance(inner, Mapping) else tool.get("name")
    return name if isinstance(name, str) and name else None


def _tool(tool: Any, number: int) -> Message:
    if isinstance(tool, Mapping) and "function" in tool:
        tool = {**tool, "function": from_json(tool["function"])}
    if not isinstance(tool, Mapping) or tool_name(tool) is None:
        raise BadRecord(f"tool {number} is not a JSON schema with a name")
    out = _schema(tool)
    if isinstance(out.get("function"), Mapping):
        out["function"] = _schema(out["function"])
    check_plain(f"tool {number}", out)
    return out


def _schema(table: Mapping[str, Any]) -> Message:
    out = _present(table)
    return {**out, "parameters": from_json(out["parameters"])} if "parameters" in out else out


def _present(table: Mapping[str, Any]) -> Message:
    return {key: value for key, value in table.items() if value is not None}


def _message(message: Any, number: int) -> Message:
    """Columnar files fill keys that a message does not have with null; templates ask whether a key is defined."""
    if not isinstance(message, Mapping):
        raise BadRecord(f"message {number} is not an object with a role")
    out = _present(message)
    if "role" not in out and "from" in out:
        out = _from_sharegpt(out, number)
    if "role" not in out:
        raise BadRecord(f"message {number} has neither a role nor a from; give role and content, or from and value")
    if not isinstance(out["role"], str) or not out["role"]:
        raise BadRecord(f"message {number} has the role {out['role']!r}; give text (system, user, assistant, tool)")
    out["role"] = _role(out["role"])
    where = f"message {number} ({out['role']})"
    if "content" in out:
        out["content"] = _content(out["content"], where)
    if "function_call" in out:
        if out.get("tool_calls"):
            raise BadRecord(f"{where} has function_call and tool_calls; remove one")
        out["tool_calls"] = [{"type": "function", "function": out.pop("function_call")}]
    if "tool_calls" in out:
        out["tool_calls"] = _calls(from_json(out["tool_calls"]), where)
    if reasoning := _reasoning(out, where):  # the name that templates read, whatever the version of transformers
        out["reasoning_content"] = reasoning
    if not out.get("tool_calls"):
        out.pop("tool_calls", None)
        if "content" not in out and not reasoning:
            raise BadRecord(f"{where} has no text content")
    if "weight" in out and out["weight"] not in (0, 1):
        raise BadRecord(f"{where} has the weight {out['weight']!r}; 0 and 1 are possible")
    check_plain(where, out)
    return out


def _reasoning(message: Mapping[str, Any], where: str) -> str:
    key = one_of(message, ("reasoning_content", "reasoning", "thinking"), where)
    text = message[key] if key else ""
    if not isinstance(text, str):
        raise BadRecord(f"{where} has {key} of type {type(text).__name__}, not text")
    return text


def _role(role: str) -> str:
    """As templates know it: `Assistant` and `gpt` are the assistant; roles of a template's own stay."""
    known = ROLES.get(role.lower(), role.lower())
    return known if known in _STANDARD else role


def _from_sharegpt(message: Message, number: int) -> Message:
    role, value = message.pop("from"), message.pop("value", None)
    if role == _CALL:
        calls = from_json(value)
        return {**message, "role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    if not isinstance(role, str) or _role(role) not in _STANDARD:
        raise BadRecord(f"message {number} is from {role!r}, which is no known role; use system, human, gpt or tool")
    return {**message, "role": role, **({} if value is None else {"content": value})}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        check_plain(where, content)
        raise BadRecord(f"{where} has no text content, but a value of type {type(content).__name__}; give JSON as text")
    if not content:
        raise BadRecord(f"{where} has no text content: its list of parts is empty")
    return "\n".join(_part(part, where) for part in content)  # as `flarec serve` and other servers join them


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise BadRecord(f"{where} has no text content: a part is of type {type(part).__name__}")
    kind, text = part.get("type", "text"), part.get("text")
    if kind not in _TEXT_PARTS:
        raise BadRecord(f"{where} has a part of type {kind!r}, and a text model reads text alone; leave the record out")
    if not isinstance(text, str):
        raise BadRecord(f"{where} has a part of type {kind!r} without text")
    return text


def _calls(calls: Any, where: str) -> list[Message]:
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise BadRecord(f"{where} has tool_calls that are no list")
    return [_call(from_json(item), f"{where}: tool call {number}") for number, item in enumerate(calls, 1)]


def _call(call: Any, where: str) -> Message:
    """With the function in a table of its own, as templates expect it."""
    inner = from_json(call.get("function", call)) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise BadRecord(f"{where} is not an object with the name of a function")
    outer = {key: value for key, value in _present(call).items() if key not in ("name", "arguments")}
    kept = inner.keys() if inner is not call else {"name", "arguments"}
    function = {key: value for key, value in _present(inner).items() if key in kept}
    function["arguments"] = _arguments(inner.get("arguments"))
    return {"type": "function", **outer, "function": function}


def _arguments(value: Any) -> Any:
    """An object, also where the file holds it as JSON text; what is no JSON stays text, which a template may print."""
    if value is None or value == "":
        return {}
    read = from_json(value)
    return CallArguments(read, innermost(value)) if isinstance(value, str) and isinstance(read, Mapping) else read


def check_plain(what: str, value: Any) -> None:
    """Raise `BadRecord` for what no template prints: half a surrogate pair, dates, bytes and other values that are not
    JSON's."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRecord(f"{what} holds half a surrogate pair, which is no text") from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_plain(what, key)
            check_plain(what, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_plain(what, item)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise BadRecord(f"{what} holds {not_text(value)}")


def not_text(value: Any) -> str:
    """A value that is neither text nor JSON, in words, and what to do."""
    if hasattr(value, "isoformat"):
        return (
            f"the date {value}, which was text before a program read dates out of it; write the file again with text, "
            "as flarec reads .jsonl"
        )
    return f"a value of type {type(value).__name__}, not text"


def with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with the arguments of tool calls as JSON text: as the file holds it, else written anew."""
    return [
        {**message, "tool_calls": [_text_call(call) for call in message["tool_calls"]]}
        if "tool_calls" in message else message
        for message in messages
    ]


def _text_call(call: Message) -> Message:
    arguments = call["function"]["arguments"]
    text = arguments.text if isinstance(arguments, CallArguments) else None
    if text is None:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def arguments_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The arguments of all tool calls that are objects."""
    found = (call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ()))
    return [dict(arguments) for arguments in found if isinstance(arguments, Mapping)]
