"""The routes: OpenAI's models, completions and chats; health and metrics."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import time as now
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from flarec.base.generation import GenerationOptions

from .calls import in_template
from .exchanges import Exchange, Exchanges
from .fields import ChatFields, CompletionFields, Sampling, parse
from .jobs import Job, News
from .meter import Meter
from .prompts import SHORT, Served, chat_prompt, choices_of, completion_prompts, options_of
from .refusals import HttpRefusal
from .replies import DONE, ChatReply, CompletionReply, Reply, Transcript, encoded, event, usage
from .worker import Worker

BODY_SECONDS = 60
"""For a client to send its request in."""


@dataclass(frozen=True)
class Limits:
    """queue: generations that run or wait; body: bytes of a request."""

    queue: int = 1024
    body: int = 4 << 20


class Service:
    """One model behind HTTP.

    name     under which clients know the model
    api_key  that `/v1` asks for; None: none
    """

    def __init__(
        self, model: Served, name: str, *, api_key: str | None = None, limits: Limits | None = None
    ) -> None:
        self.model, self.name, self.api_key = model, name, api_key
        self.limits = limits or Limits()
        self.exchanges = Exchanges()
        self.meter = Meter(model.engine.stats)
        self.meter.queued = self._queued
        self.worker = Worker(model, self.meter, self.exchanges.publish, self.limits.queue)
        self._encoding = asyncio.Lock()
        self._born = int(now())

    def _queued(self) -> tuple[int, int]:
        jobs = list(self.worker.open)
        running = sum(job.first is not None for job in jobs)
        return len(jobs) - running, running

    def app(self) -> FastAPI:
        # no pages that load scripts from elsewhere
        app = FastAPI(title="flarec", docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        app.add_exception_handler(HttpRefusal, self._refused)
        app.add_exception_handler(HTTPException, self._refused)
        app.add_exception_handler(Exception, self._failed)
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.one_model, methods=["GET"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self.chats, methods=["POST"])
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.exchanges.loop = asyncio.get_running_loop()
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.close)

    async def _refused(self, request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # the router's own: no such path, no such method
            error = HttpRefusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        assert isinstance(error, HttpRefusal)
        self.meter.refused[str(error.status)] += 1
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    async def _failed(self, request: Request, error: Exception) -> Response:
        """A fault of ours: the client gets an answer, stderr the traceback."""
        return await self._refused(request, HttpRefusal(500, f"the server failed: {type(error).__name__}"))

    async def health(self) -> Response:
        if not self.worker.alive:
            raise HttpRefusal(503, "the engine does not run")
        return JSONResponse({"status": "ok"})

    async def metrics(self) -> Response:
        return Response(self.meter.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request, name: str) -> Response:
        self._check_key(request)
        self._check_name(name)
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        fields = parse(CompletionFields, await self._body(request))
        self._check_name(fields.model)
        options = options_of(self.model, fields, SHORT)
        async with self._encoding:
            prompts = await asyncio.to_thread(completion_prompts, self.model, fields)
        jobs = self._jobs(prompts, options, fields, fields.logprobs)
        reply = CompletionReply(
            self.model, self.name, with_usage=fields.usage_in_stream, logprobs=fields.logprobs is not None
        )
        return await self._answer(request, fields, jobs, reply)

    async def chats(self, request: Request) -> Response:
        fields = parse(ChatFields, await self._body(request))
        self._check_name(fields.model)
        options = options_of(self.model, fields, fields.max_completion_tokens or self.model.engine.max_positions)
        async with self._encoding:
            prompt = await asyncio.to_thread(chat_prompt, self.model, fields)
        jobs = self._jobs([prompt], options, fields, fields.wanted_logprobs)
        reply = ChatReply(
            self.model, self.name, with_usage=fields.usage_in_stream, logprobs=fields.wanted_logprobs is not None,
            functions=fields.functions if in_template(self.model.tokenizer.chat_template) else (),
        )
        return await self._answer(request, fields, jobs, reply)

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._born, "owned_by": "flarec",
                "max_model_len": self.model.engine.max_positions}

    def _check_key(self, request: Request) -> None:
        if self.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.api_key.encode()):
            raise HttpRefusal(401, "the API key is missing or wrong", code="invalid_api_key",
                          headers={"WWW-Authenticate": "Bearer"})

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise HttpRefusal(
                404, f"the model {name[:200]!r} does not exist; this server has {self.name!r}", param="model",
                code="model_not_found",
            )

    async def _body(self, request: Request) -> bytes:
        """The body of a request that may be served. Raises `HttpRefusal`."""
        self._check_key(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HttpRefusal(415, "the body is not said to be JSON; send Content-Type: application/json")
        limit, found = self.limits.body, bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    found += chunk
                    if len(found) > limit:
                        raise HttpRefusal(413, f"the body has more than {limit} bytes", headers={"Connection": "close"})
        except TimeoutError:
            raise HttpRefusal(408, f"the body did not come within {BODY_SECONDS} s") from None
        except ClientDisconnect:
            raise HttpRefusal(400, "the client went away") from None
        return bytes(found)

    def _jobs(
        self, prompts: Sequence[list[int]], options: GenerationOptions, fields: Sampling, logprobs: int | None
    ) -> list[Job]:
        """One per prompt and choice, in OpenAI's order."""
        count = fields.n or 1
        if len(prompts) * count > self.limits.queue:
            raise HttpRefusal(
                400, f"{len(prompts)} prompts with {count} choices each are more than {self.limits.queue} generations",
                param="n",
            )
        return [Job(prompt, item, logprobs) for prompt in prompts for item in choices_of(options, count)]

    async def _answer(self, request: Request, fields: Sampling, jobs: list[Job], reply: Reply) -> Response:
        exchange = self.exchanges.open(self.worker, jobs)
        if fields.stream:
            return await Stream.of(self, exchange, reply, fields.usage_in_stream)
        whole = await unless_gone(request.receive, collected(exchange))
        if whole is None:
            exchange.cancel()
            return Response(status_code=400)
        return Response(
            encoded(reply.whole(whole, usage(jobs, sum(choice.tokens for choice in whole)))),
            media_type="application/json",
        )


async def collected(exchange: Exchange) -> list[Transcript]:
    """What all jobs said, once they have ended."""
    choices = {job: Transcript(index) for index, job in enumerate(exchange.jobs)}
    async for items in exchange.news():
        for item in items:
            choices[item.job].take(item)
    for choice in choices.values():
        check_end(choice)
    return list(choices.values())


def check_end(choice: Transcript) -> None:
    """Raise `HttpRefusal` for a choice that the server ended."""
    if choice.finish == "cancelled":
        raise HttpRefusal(503, "the server is shutting down", code="shutting_down")


async def unless_gone(receive: Receive, work: Awaitable[Any]) -> Any:
    """The result of `work`, or None if the client goes away before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """Server-sent events, a piece of news of each choice per event. A client that goes away cancels its exchange."""

    def __init__(self, service: Service, exchange: Exchange, reply: Reply, with_usage: bool) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.service, self.exchange, self.reply, self.with_usage = service, exchange, reply, with_usage
        self.choices = {job: Transcript(index) for index, job in enumerate(exchange.jobs)}
        self._news = exchange.news()
        self._first: list[News] = []

    @classmethod
    async def of(cls, service: Service, exchange: Exchange, reply: Reply, with_usage: bool) -> Stream:
        """Once the engine has taken all jobs: what it refuses is refused with a status. Raises `HttpRefusal`."""
        stream = cls(service, exchange, reply, with_usage)
        try:
            stream._first = await _until_taken(stream._news, len(exchange.jobs))
        except BaseException:
            exchange.cancel()
            raise
        return stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await unless_gone(receive, self._send(lambda body: send(
                {"type": "http.response.body", "body": body, "more_body": True}
            )))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.exchange.cancel()

    async def _send(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        opening = b"".join(self.reply.opening(choice.index) for choice in self.choices.values())
        try:
            await write(opening + self._pieces(self._first))
            async for items in self._news:
                if pieces := self._pieces(items):
                    await write(pieces)
            for choice in self.choices.values():
                check_end(choice)
            end = DONE
            if self.with_usage:
                tokens = sum(choice.tokens for choice in self.choices.values())
                end = self.reply.total(usage(self.exchange.jobs, tokens)) + end
            await write(end)
        except HttpRefusal as error:  # the status is sent: the error is an event
            await write(event(encoded(error.body())) + DONE)

    def _pieces(self, items: Sequence[News]) -> bytes:
        pieces = []
        for item in items:
            choice = self.choices[item.job]
            choice.tokens = max(choice.tokens, item.tokens)
            choice.finish = item.finish
            if item.text or item.chosen or item.finish in ("stop", "length"):
                pieces.append(self.reply.piece(choice, item))
        return b"".join(pieces)


async def _until_taken(news: AsyncIterator[list[News]], jobs: int) -> list[News]:
    """News until every job has some: the first of each says that the engine took it."""
    found: list[News] = []
    while len({item.job for item in found}) < jobs:
        found += await anext(news)
    return found
