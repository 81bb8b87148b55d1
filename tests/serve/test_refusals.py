"""What cannot be served gets a status of 4xx with a message that names the field; the server goes on."""

from __future__ import annotations

import contextlib
import json
import math
import socket
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.serve.serving import NAME, metrics, send

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
VALID: dict[str, dict[str, Any]] = {
    CHAT: {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    TEXT: {"model": NAME, "prompt": "hi", "max_tokens": 2},
}


def refused(url: str, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Status and error of a request that must not be served."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer = send(url, "POST", path, data, headers)
    assert 400 <= status < 500, (status, answer)
    error: dict[str, Any] = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"].endswith("_error")
    assert 5 < len(error["message"]) < 500 and "Traceback" not in error["message"]
    return status, error


NUMBERS: tuple[Any, ...] = (None, "1", True, [], {}, 1.5, -1, 10**30)
WRONG: dict[str, tuple[Any, ...]] = {
    "model": (None, 5, "", "other", ["tiny"], {}),
    "max_tokens": (*NUMBERS[1:], 0),
    "temperature": ("1", True, [], -0.1, 1e7, 10**30),
    "top_p": ("1", True, 0, 1.01, -1),
    "top_k": ("1", True, 1.5, -2, 10**30),
    "seed": ("1", True, 1.5, -1, 10**30),
    "n": ("1", True, 1.5, 0, 129),
    "stop": (5, "", [""], ["a", 5], ["x"] * 17, "x" * 257, {}),
    "stream": ("true", 1, []),
    "stream_options": (True, {"include_usage": 1}, {"other": True}, {"include_usage": True}),
    "mode": ("fast", 1, "", ["causal"]),
    "drafts": ("many", True),
    "threshold": (1.5, -0.1, "0.5"),
    "recheck": (1.5, -0.1, "0.5"),
    "denoising_steps": (0, 1.5, "2"),
    "frequency_penalty": (0.5, "0"),
    "presence_penalty": (-1,),
    "logit_bias": ({"5": 1.0}, []),
    "user": (5,),
    "functions": ([],),
    "guided_json": ({},),
    "max-tokens": (3,),
}
OF_CHATS: dict[str, tuple[Any, ...]] = {
    "messages": (
        None, "hi", [], [5], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": "x", "colour": "red"}], [{"role": "user", "content": None}],
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}],
        [{"role": "user", "content": "word " * 3000}],
    ),
    "max_completion_tokens": (0, "5", 3),
    "logprobs": (1, "true"),
    "top_logprobs": (1, -1, 21),
    "tools": ("x", [5], [{"type": "function"}], [{"type": "code"}], [{"type": "function", "function": {"name": ""}}]),
    "tool_choice": ("required", {"type": "function", "function": {"name": "f"}}),
    "response_format": ({"type": "json_object"}, "text"),
    "chat_template_kwargs": (5, {"tokenize": False}, {"chat_template": "{{ 7 * 7 }}"}, {"messages": []}),
    "prompt": ("hi",),
}
OF_TEXTS: dict[str, tuple[Any, ...]] = {
    "prompt": (None, 5, [], [[]], [5, "x"], [["x"]], [-1], [True], [10**9], [[5], []], "", "word " * 3000, {},
               ["x"] * 1025),
    "logprobs": (True, -1, 21, 1.5),
    "echo": (True,),
    "best_of": (2,),
    "suffix": ("x",),
    "max_completion_tokens": (5,),
    "messages": ([],),
}
CASES = [
    (path, field, value)
    for path, more in ((CHAT, OF_CHATS), (TEXT, OF_TEXTS))
    for field, values in {**WRONG, **more}.items()
    for value in values
]


def test_wrong_values_are_refused_by_the_fields_name(url: str) -> None:
    for path, field, value in CASES:
        status, error = refused(url, path, {**VALID[path], field: value})
        assert status == (404 if field == "model" and isinstance(value, str) else 400)
        assert error["param"] is not None and error["param"].split(".")[0] == field, (field, value, error)
    assert len(CASES) > 190
    for path in VALID:
        for field in ("model", "messages" if path == CHAT else "prompt"):
            body = {name: value for name, value in VALID[path].items() if name != field}
            assert refused(url, path, body)[1]["message"] == f"the field '{field}' is missing"
    assert send(url, "GET", "/health") == (200, {"status": "ok"})


RAW = [
    b"", b"[", b"{", b"null", b"5", b'"text"', b"[]", b"\xff\xfe", b"\x00", b"{" * 50_000, b"[" * 90_000,
    b'{"model":NaN}', b'{"model":"tiny","prompt":"\xff"}', b'{"model":"tiny","prompt":"\\ud800"}', b"{'model': 'tiny'}",
    json.dumps(VALID[TEXT]).encode("utf-16"), json.dumps(VALID[TEXT])[:-1].encode(),
    b'{"model":"tiny","prompt":"x","temperature":NaN}', b'{"model":"tiny","prompt":"x","temperature":Infinity}',
    b'{"model":"tiny","prompt":"x","temperature":1e999}', b'{"model":"tiny","prompt":"x","seed":' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("body", RAW, ids=lambda body: repr(body[:24]))
def test_bodies_that_are_no_request(body: bytes, url: str) -> None:
    for path in (CHAT, TEXT):
        assert refused(url, path, body)[0] == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6,
)
KNOWN = {*WRONG, *OF_CHATS, *OF_TEXTS, "best_of", "echo"}


@settings(max_examples=50)
@given(path=st.sampled_from([CHAT, TEXT]), name=st.text(max_size=12).filter(lambda name: name not in KNOWN), value=JSON)
@example(path=TEXT, name="str", value=1)  # as a member of a union is called
@example(path=CHAT, name="list[int]", value=None)
def test_unknown_fields_whatever_they_hold(path: str, name: str, value: Any, url: str) -> None:
    error = refused(url, path, {**VALID[path], name: value})[1]
    assert "is unknown or not supported" in error["message"]
    if name.isascii() and name.isprintable() and not set(name) & set("'\\"):
        assert error["param"] == name and f"'{name}'" in error["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(("mode", "name", "value"), [
    ("causal", "drafts", "auto"), ("causal", "threshold", 0.5), ("causal", "denoising_steps", 2),
    ("ar-trust", "threshold", 0.5), ("ar-trust", "recheck", 0.5), (None, "denoising_steps", 2),
    ("diffusion-trust", "drafts", "single"),
])
def test_fields_of_another_mode(mode: str | None, name: str, value: Any, path: str, url: str) -> None:
    error = refused(url, path, {**VALID[path], "mode": mode, name: value})[1]
    assert error["param"] == name
    assert error["message"] == f"{name} does nothing in mode {mode or 'ar-trust'}; leave it out"


@pytest.mark.parametrize(
    ("name", "value"),
    [("frequency_penalty", 0.5), ("presence_penalty", -0.5), ("logit_bias", {"5": 1.0}), ("best_of", 2)],
)
def test_fields_that_may_only_change_nothing(name: str, value: Any, url: str) -> None:
    error = refused(url, TEXT, {**VALID[TEXT], name: value})[1]
    assert error["message"] == f"{name} is not supported with a value that has an effect; leave it out"


@settings(max_examples=150)
@given(body=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(body: bytes, url: str) -> None:
    assert refused(url, TEXT, body)[0] == 400


def test_too_large_and_of_another_kind(url: str) -> None:
    large = {**VALID[TEXT], "prompt": "x" * 100_001}
    status, error = refused(url, TEXT, large)
    assert (status, error["message"]) == (413, "the body has more than 100000 bytes")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""):
        assert refused(url, TEXT, VALID[TEXT], {"Content-Type": kind})[0] == 415
    headers, body = {"Content-Type": "Application/JSON; x=y"}, json.dumps(VALID[TEXT]).encode()
    assert send(url, "POST", TEXT, body, headers)[0] == 200


def test_paths_and_methods(url: str) -> None:
    assert refused(url, "/v1/embeddings", b"{}")[0] == 404
    for method, path in (("GET", CHAT), ("DELETE", TEXT), ("POST", "/health"), ("PUT", "/v1/models")):
        status, answer = send(url, method, path)
        assert status == 405 and answer["error"]["message"].endswith("Method Not Allowed")
    for path in ("/docs", "/openapi.json", "/redoc", "/", "/v1", "/v1/models/other", "/v1/models/../../etc/passwd"):
        assert send(url, "GET", path)[0] == 404, path


@pytest.mark.parametrize("data", [
    b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{}",
], ids=lambda data: repr(data[:60]))
def test_what_is_no_http(data: bytes, url: str) -> None:
    host, port = url.split("/")[2].split(":")
    with socket.create_connection((host, int(port))) as connection:
        answer = b""
        with contextlib.suppress(OSError):  # the server need not read on
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(1 << 16):
                answer += piece
    assert b"Traceback" not in answer and (not answer or answer.startswith(b"HTTP/1.1 4"))
    assert send(url, "GET", "/health")[0] == 200


def test_refusals_are_counted_and_nothing_is_left(url: str) -> None:
    before = metrics(url)
    refused(url, TEXT, b"{}")
    refused(url, TEXT, {**VALID[TEXT], "prompt": "word " * 3000})
    after, count = metrics(url), 'flarec_refusals_total{status="400"}'
    assert after[count] == before.get(count, 0) + 2
    ended = [name for name in after if name.startswith("flarec_generations_total")]
    assert all(after[name] == before[name] for name in ended) and not any("error" in name for name in ended)
    assert after["flarec_requests_waiting"] == after["flarec_requests_running"] == 0
    assert after["flarec_engine_failures_total"] == 0 and not math.isnan(after["flarec_tokens_per_forward"])
