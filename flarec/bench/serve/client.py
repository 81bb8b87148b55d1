"""HTTP/1.1 over asyncio's sockets, as much as a load generator needs: one request per connection, streams by event."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ...errors import FlarecError, UsageError, first_line

MOST_HEAD = 1 << 16


class ServerError(FlarecError):
    """A server answered with an error, or not in HTTP."""


@dataclass(frozen=True)
class Server:
    """Where requests go. path: of the base URL, without a slash at its end; key: of the API, None for none."""

    host: str
    port: int
    path: str
    secure: bool = False
    key: str | None = None

    @staticmethod
    def at(url: str, key: str | None = None) -> Server:
        """Of a base URL such as http://127.0.0.1:8000/v1. Raises `UsageError`."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UsageError(f"the base URL {url!r} cannot be read: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"the base URL is {url!r}; give one such as http://127.0.0.1:8000/v1")
        secure = parts.scheme == "https"
        return Server(parts.hostname, port or (443 if secure else 80), parts.path.rstrip("/"), secure, key)

    async def get(self, path: str) -> bytes:
        """The body of an answer. Raises `ServerError`."""
        reader, writer = await self._send("GET", path, b"")
        try:
            status, chunked, length = await _head(reader)
            body = b"".join([piece async for piece in _body(reader, chunked, length)])
        finally:
            writer.close()
        if status != 200:
            raise ServerError(f"{path}: {_message(status, body)}")
        return body

    async def stream(self, path: str, fields: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a request with stream = true; closing the iterator closes the connection. Raises
        `ServerError`."""
        reader, writer = await self._send("POST", self.path + path, json.dumps({**fields, "stream": True}).encode())
        try:
            status, chunked, length = await _head(reader)
            if status != 200:
                body = b"".join([piece async for piece in _body(reader, chunked, length)])
                raise ServerError(_message(status, body))
            rest = b""
            async for piece in _body(reader, chunked, length):
                *events, rest = (rest + piece).split(b"\n\n")
                for event in events:
                    data = event.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    found: dict[str, Any] = json.loads(data)
                    if "error" in found:
                        raise ServerError(str(found["error"].get("message")))
                    yield found
            raise ServerError("the stream ended in the middle")
        finally:
            writer.close()

    async def _send(self, method: str, path: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            reader, writer = await asyncio.open_connection(
                self.host, self.port, limit=MOST_HEAD, ssl=ssl.create_default_context() if self.secure else None
            )
        except OSError as error:
            raise ServerError(f"{self.host}:{self.port} cannot be reached: {first_line(error)}") from None
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: application/json\r\n{key}"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
        )
        return reader, writer


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool, int | None]:
    """Status, whether the body comes in chunks, and its length where it is said."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers["content-length"]) if "content-length" in headers else None
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError, IndexError) as error:
        raise ServerError(f"the answer is no HTTP: {first_line(error)}") from None
    return status, headers.get("transfer-encoding", "").lower() == "chunked", length


async def _body(reader: asyncio.StreamReader, chunked: bool, length: int | None) -> AsyncIterator[bytes]:
    try:
        if not chunked:
            yield await (reader.read() if length is None else reader.readexactly(length))
            return
        while size := int((await reader.readline()).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    except (asyncio.IncompleteReadError, OSError, ValueError) as error:
        raise ServerError(f"the answer ended in the middle: {first_line(error)}") from None


def _message(status: int, body: bytes) -> str:
    try:
        return f"{status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {body[:200].decode(errors='replace')}"
