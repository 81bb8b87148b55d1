"""A server in a thread of this process, and clients for it."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai

from flarec.serve.app import Service
from flarec.serve.run import HttpServer, listening, url_of

NAME = "tiny"


@contextlib.contextmanager
def served(service: Service) -> Iterator[str]:
    """Serves until the context ends; gives the base URL."""
    bound, ready = listening("127.0.0.1", 0), threading.Event()
    server = HttpServer(service, grace=1, ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    ready.wait()
    try:
        yield url_of(bound)
    finally:
        server.should_exit = True
        thread.join()


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0)


def send(url: str, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and body of a request, as it is: JSON where it is some. The path is the whole one."""
    connection = http.client.HTTPConnection(url.split("/")[2])
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    try:
        return answer.status, json.loads(data)
    except ValueError:
        return answer.status, data.decode(errors="replace")


def metrics(url: str) -> dict[str, float]:
    text = send(url, "GET", "/metrics")[1]
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def until(condition: Callable[[], bool]) -> None:
    """What hangs is ended by pytest's own timeout. Between two looks others have the interpreter."""
    between = threading.Event()
    while not condition():
        between.wait(0.005)
