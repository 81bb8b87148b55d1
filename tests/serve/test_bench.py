"""`flarec bench serve`: the client, the loops, the arithmetic, and a run against a server."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flarec.bench.serve.client import Server, ServerError
from flarec.bench.serve.load import Answered, ask, closed_loop, open_loop
from flarec.bench.serve.results import counters, result
from flarec.cli import main
from flarec.errors import UsageError

EVENT = {"choices": [{"index": 0, "text": "é", "finish_reason": None}]}
USAGE = {"choices": [], "usage": {"completion_tokens": 7}}


class Turn:
    """Lets the others run once."""

    def __await__(self) -> Generator[None, None, None]:
        yield


def sse(*events: Any) -> bytes:
    return b"".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode() for event in events)


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def answered_with(raw: bytes, use: Callable[[Server], Awaitable[Any]]) -> Any:
    """What `use` returns against a server that answers every request with these bytes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)
        writer.close()

    async def run() -> Any:
        async with await asyncio.start_server(handle, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            return await use(Server.at(f"http://127.0.0.1:{port}/v1/"))

    return asyncio.run(run())


@pytest.mark.parametrize("size", [1, 3, 50, 10_000])
def test_events_however_they_are_cut(size: int) -> None:
    body = sse(EVENT, EVENT, USAGE) + b"data: [DONE]\n\n"
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(body, size)
    found = answered_with(raw, lambda server: ask(server, "/completions", {}))
    assert (len(found.arrivals), found.tokens, found.error) == (2, 7, None)
    assert 0 <= found.arrivals[0] <= found.arrivals[1] <= found.seconds


@pytest.mark.parametrize(("raw", "message"), [
    (b'HTTP/1.1 400 Bad\r\nContent-Length: 33\r\n\r\n{"error": {"message": "no, no."}}', "400: no, no."),
    (b'HTTP/1.1 400 Bad\r\nContent-Length: 99\r\n\r\n{"error"', "the answer ended in the middle"),
    (b'HTTP/1.1 503 Bad\r\nConnection: close\r\n\r\nbusy', "503: busy"),
    (b"SSH-2.0\r\n\r\n", "the answer is no HTTP"),
    (b"", "the answer is no HTTP"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\ndata", "the answer ended in the middle"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(sse(EVENT), 9), "stream ended in the middle"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(sse({"error": {"message": "it broke"}}), 9),
     "it broke"),
])
def test_answers_that_are_none(raw: bytes, message: str) -> None:
    found = answered_with(raw, lambda server: ask(server, "/completions", {}))
    assert found.error is not None and message in found.error


def test_base_urls() -> None:
    assert Server.at("http://[::1]:80/v1") == Server("::1", 80, "/v1")
    assert Server.at("https://host.example", "k") == Server("host.example", 443, "", True, "k")
    for url in ("host:8000", "ftp://host/v1", "http://", "http://host:port/v1", ""):
        with pytest.raises(UsageError, match="base URL"):
            Server.at(url)
    with pytest.raises(ServerError, match="cannot be reached"):
        asyncio.run(Server.at("http://127.0.0.1:1/v1").get("/metrics"))


def test_a_closed_loop_keeps_its_clients_busy_and_no_more() -> None:
    running, most, order = 0, 0, []

    async def send(number: int) -> Answered:
        nonlocal running, most
        running += 1
        most = max(most, running)
        order.append(number)
        for _ in range(number % 3 + 1):
            await Turn()
        running -= 1
        return Answered(tokens=number)

    answers = asyncio.run(closed_loop(send, 20, 6))
    assert most == 6 and order == list(range(20)) and sorted(item.tokens for item in answers) == order
    assert len(asyncio.run(closed_loop(send, 2, 64))) == 2


def test_an_open_loop_waits_for_nobody() -> None:
    sent: list[int] = []

    async def send(number: int) -> Answered:
        sent.append(number)
        while len(sent) < 30:  # nobody is answered before all have been sent
            await Turn()
        return Answered(tokens=1)

    assert len(asyncio.run(open_loop(send, 30, 1e6))) == 30 and sent == list(range(30))


def test_the_arithmetic() -> None:
    answers = [Answered([0.1, 0.3], 5, 0.5), Answered([0.2], 3, 0.4), Answered(error="x"), Answered([0.3], 1, 0.3)]
    names = "flarec_generation_tokens_total", "flarec_generation_forwards_total"
    drafted, accepted = (f'flarec_{word}_tokens_total{{position="%d"}}' for word in ("drafted", "accepted"))
    before = {names[0]: 10.0, names[1]: 10.0, drafted % 1: 4.0}
    after = {names[0]: 22.0, names[1]: 14.0, drafted % 1: 14.0, drafted % 2: 10.0, accepted % 1: 5.0}
    found = result("ar-trust", "closed", 4, answers, 2.0, before, after)
    assert (found.requests, found.errors, found.tokens, found.tokens_per_second) == (4, 1, 9, 4.5)
    assert found.first_token_ms == (200.0, 300.0) and found.token_ms == pytest.approx(100.0)
    assert found.tokens_per_forward == 3.0 and found.accepted == (0.5, 0.0)
    assert "1 OF 4 REQUESTS FAILED" in found.text() and "3.00 tokens per forward" in found.text()
    other = result("x", "open", 1.5, [], 1.0, {}, {})
    assert other.tokens_per_forward is None and other.accepted == () and other.first_token_ms == (0.0, 0.0)
    assert counters("# HELP a b\na 1.0\nb{x=\"y\"} 2e3\nnonsense\n\n") == {"a": 1.0, 'b{x="y"}': 2000.0}


def test_a_run(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    words = ["bench", "serve", url, "--prompts", tmp_path / "prompts.txt", "--clients", 3, "--rate", 500, "--requests",
             6, "--max-tokens", 5, "--mode", "causal", "--mode", "ar-trust", "--out", out, "--plot", picture]
    typed = [str(word) for word in (*words, "--api-key", "a secret")]
    monkeypatch.setattr(sys, "argv", ["flarec", *typed])
    done = CliRunner().invoke(main, typed)
    assert done.exit_code == 0, done.output
    said = json.loads(out.read_text())["command"]
    assert said.startswith(f"flarec bench serve {url} --prompts") and said.endswith("--api-key KEY")
    rows = json.loads(out.read_text())["rows"]
    assert [(row["name"], row["kind"], row["load"]) for row in rows] == [
        (mode, kind, load) for mode in ("causal", "ar-trust") for kind, load in (("closed", 3), ("open", 500))
    ]
    assert all((row["requests"], row["errors"], row["tokens"]) == (6, 0, 30) for row in rows)
    assert rows[0]["tokens_per_forward"] == 1.0 and rows[2]["tokens_per_forward"] >= 1.0
    assert rows[0]["accepted"] == [] and len(rows[2]["accepted"]) == 3
    assert picture.read_text().startswith("<?xml") and len(done.stdout.splitlines()) == 4

    def failing(*more: str) -> str:
        failed = CliRunner().invoke(main, ["bench", "serve", url, "--prompts", str(tmp_path / "prompts.txt"), *more])
        assert failed.exit_code == 2
        return failed.output

    assert "the server refuses what would be sent: 400: mode is 'fast'" in failing("--mode", "fast")
    assert "prompts.txt" in failing("--out", str(tmp_path / "prompts.txt"))
    assert (tmp_path / "prompts.txt").read_text() == "one\ntwo\nthree\n"
