"""Clients that go away, queues that are full, keys, an engine that fails, and the end of the server."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner

from flarec import api
from flarec.cli import main
from flarec.errors import UsageError
from flarec.serve.app import Limits, Service
from flarec.serve.run import is_loopback, listening, url_of
from tests.checkpoints import adapted
from tests.serve.serving import NAME, client_of, metrics, send, served, until

LONG = {"model": NAME, "prompt": "long", "max_tokens": 900, "temperature": 0.5, "seed": 3}
SHORT = {**LONG, "max_tokens": 5}


class Gate:
    """Lets the engine of a service take as many steps as it is told to."""

    def __init__(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = threading.Semaphore(0)
        step = service.model.engine.step

        def gated() -> Any:
            self.steps.acquire()
            return step()

        monkeypatch.setattr(service.model.engine, "step", gated)

    def open(self) -> None:
        self.steps.release(100_000)


def service_of(model: api.Model, **options: Any) -> Service:
    return Service(model, NAME, **options)


def sdk(url: str, key: str = "none") -> Any:
    """The client without its types: bodies are dictionaries here."""
    return client_of(url, key)


def post(url: str, body: dict[str, Any]) -> http.client.HTTPConnection:
    """A request whose answer nobody has read."""
    connection = http.client.HTTPConnection(url.split("/")[2])
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_request(
    stream: bool, model: api.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(model)
    gate = Gate(service, monkeypatch)
    with served(service) as url:
        gone = post(url, {**LONG, "stream": stream, "n": 3})
        until(lambda: len(service.worker.open) == 3)
        other = post(url, SHORT)
        until(lambda: len(service.worker.open) == 4)
        gate.steps.release(3)
        until(lambda: service._queued()[1] > 0)
        if stream:
            assert gone.sock.recv(100).startswith(b"HTTP/1.1 200")
        gone.close()
        gate.open()
        answer = json.loads(other.getresponse().read())
        assert answer["usage"]["completion_tokens"] == 5
        until(lambda: not service.worker.open)
        assert metrics(url)['flarec_generations_total{finish="cancelled"}'] == 3
        assert answer["choices"][0]["text"] == model.generate_ids(
            [model.encode("long")], max_new_tokens=5, temperature=0.5, seed=3
        )[0].text
    assert not model.engine.busy


def test_a_full_queue_refuses_and_goes_on(model: api.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(model, limits=Limits(queue=3))
    gate = Gate(service, monkeypatch)
    with served(service) as url:
        waiting = [post(url, SHORT) for _ in range(3)]
        until(lambda: len(service.worker.open) == 3)
        with pytest.raises(openai.RateLimitError, match="3 generations run or wait, and at most 3 may") as caught:
            sdk(url).completions.create(**SHORT)
        assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "queue_full"
        with pytest.raises(openai.BadRequestError, match="are more than 3 generations"):
            sdk(url).completions.create(**SHORT, n=4)
        assert send(url, "GET", "/health")[0] == 200
        gate.open()
        texts = {json.loads(one.getresponse().read())["choices"][0]["text"] for one in waiting}
        assert len(texts) == 1
        assert sdk(url).completions.create(**SHORT).choices[0].text in texts
        assert metrics(url)['flarec_refusals_total{status="429"}'] == 1


def test_a_step_that_fails_is_told_and_the_next_request_is_served(
    model: api.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(model)
    step, count = model.engine.step, iter(range(10_000))

    def failing() -> Any:
        if next(count) == 2:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return step()

    monkeypatch.setattr(model.engine, "step", failing)
    with served(service) as url, sdk(url) as client:
        with pytest.raises(openai.APIError, match="the engine failed: CUDA error: out of memory"):
            for _ in client.completions.create(**LONG, stream=True):
                pass
        assert len(client.completions.create(**SHORT).choices) == 1
        assert metrics(url)["flarec_engine_failures_total"] == 1


def test_a_fault_of_ours_is_an_answer_and_the_server_goes_on(
    model: api.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(model)

    def fails(*args: Any, **keywords: Any) -> Any:
        raise RuntimeError("mine")

    with served(service) as url:
        with monkeypatch.context() as patch:
            patch.setattr(service.meter, "text", fails)
            patch.setattr(model.engine, "add", fails)
            status, answer = send(url, "GET", "/metrics")
            assert (status, answer["error"]["message"]) == (500, "the server failed: RuntimeError")
            status, answer = send(url, "POST", "/v1/completions", json.dumps(SHORT).encode())
            assert (status, answer["error"]["message"]) == (500, "mine")
        assert 'flarec_generations_total{finish="error"}' not in metrics(url)
        assert send(url, "GET", "/health")[0] == 200
        assert sdk(url).completions.create(**SHORT).choices[0].finish_reason == "length"


def test_a_key(model: api.Model) -> None:
    with served(service_of(model, api_key="secret")) as url:
        for key in ("other", "", "secret2"):
            with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
                sdk(url, key or "none").completions.create(**SHORT)
        for header in ({}, {"Authorization": "secret"}, {"Authorization": "Basic secret"}, {"Authorization": "Bearer"}):
            assert send(url, "GET", "/v1/models", headers=header)[0] == 401
        assert sdk(url, "secret").completions.create(**SHORT).choices[0].finish_reason == "length"
        assert send(url, "GET", "/health")[0] == send(url, "GET", "/metrics")[0] == 200


def test_a_stopped_server_cancels_what_its_grace_does_not_cover(
    model: api.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(model)
    gate = Gate(service, monkeypatch)
    with served(service) as url:
        open_one = post(url, {**LONG, "stream": True})
        gate.steps.release(2)
        until(lambda: service._queued()[1] == 1)
        gate.open()
    open_one.close()
    assert not service.worker.open and not service.worker.alive and not model.engine.busy


def test_addresses() -> None:
    with contextlib.closing(listening("127.0.0.1", 0)) as bound:
        assert is_loopback(bound) and url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        with pytest.raises(UsageError, match=r"port \d+ of 127.0.0.1 cannot be used \(Address already in use\)"):
            bound.listen()
            listening("127.0.0.1", bound.getsockname()[1])
    with contextlib.closing(listening("0.0.0.0", 0)) as bound:
        assert not is_loopback(bound)
    with pytest.raises(UsageError, match="the host 'no such host' cannot be used"):
        listening("no such host", 0)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`flarec serve` on an adapter that lies apart from its model."""
    source, adapter = adapted(tmp_path_factory.mktemp("process"), "llama", alone=True)
    words = [sys.executable, "-m", "flarec", "serve", source, "--adapter", adapter, "--port", "0", "--device", "cpu"]
    with subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        line = started.stderr.readline()
        found = re.fullmatch(r"serving llama on (http://127\.0\.0\.1:\d+/v1)\n", line)
        assert found, line + started.stderr.read()
        yield started, found[1]
        started.kill()


@pytest.mark.slow
def test_the_command_serves_until_sigterm(process: tuple[subprocess.Popen[str], str]) -> None:
    """What is open when the signal comes is served to its end."""
    started, url = process
    client = sdk(url)
    fields: dict[str, Any] = {**SHORT, "model": "llama"}
    texts = {client.completions.create(**fields, extra_body={"mode": mode}).choices[0].text
             for mode in ("causal", "ar-trust")}
    assert len(texts) == 1
    stream = client.completions.create(**{**fields, "max_tokens": 100}, stream=True)
    next(iter(stream))
    started.send_signal(signal.SIGTERM)
    *_, last = list(stream)
    assert last.choices[0].finish_reason == "length"
    assert started.wait() == 0 and started.stderr is not None and started.stderr.read() == ""


def test_arguments_are_checked_before_the_model_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(main, ["serve", *words])
        assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.output
        return done.output

    with contextlib.closing(listening("127.0.0.1", 0)) as bound:
        bound.listen()
        assert "cannot be used" in run(str(tmp_path), "--port", str(bound.getsockname()[1]))
    assert "the API key is empty" in run(str(tmp_path), "--api-key", " ")
    assert "other characters than ASCII" in run(str(tmp_path), "--api-key", "schlüssel")
    reachable = run(str(tmp_path), "--host", "0.0.0.0", "--port", "0")
    assert "other machines can use this server, and no --api-key" in reachable
    assert "is not a model directory" in run(str(tmp_path), "--port", "0")
    monkeypatch.setitem(sys.modules, "flarec.serve.run", None)
    assert "flarec serve needs the package flarec.serve.run: pip install 'flarec[serve]'" in run(str(tmp_path))
