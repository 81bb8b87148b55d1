"""Who asks when: closed loop (so many clients, each asks again when it was answered) and open loop (so many requests
per second, whether answered or not), and what came when."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .client import Server, ServerError

Ask = Callable[[int], dict[str, Any]]
"""Number of a request -> its fields."""


@dataclass
class Answered:
    """One request. Times in seconds since it was sent: arrivals of the events that had text. tokens: as usage says."""

    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    error: str | None = None


async def ask(server: Server, path: str, fields: dict[str, Any]) -> Answered:
    """Send a request and read its stream to the end. An error becomes `Answered.error`."""
    answered, start = Answered(), time.perf_counter()
    try:
        async for event in server.stream(path, {**fields, "stream_options": {"include_usage": True}}):
            for choice in event["choices"]:
                if choice.get("text") or (choice.get("delta") or {}).get("content"):
                    answered.arrivals.append(time.perf_counter() - start)
            if event.get("usage"):
                answered.tokens = event["usage"]["completion_tokens"]
    except ServerError as error:
        answered.error = str(error)
    answered.seconds = time.perf_counter() - start
    return answered


async def closed_loop(send: Callable[[int], Awaitable[Answered]], requests: int, clients: int) -> list[Answered]:
    """`requests` requests by `clients` clients, each of which asks again once it has its answer."""
    numbers = iter(range(requests))

    async def client() -> list[Answered]:
        return [await send(number) for number in numbers]

    rows = await asyncio.gather(*(client() for _ in range(min(clients, requests))))
    return [answered for row in rows for answered in row]


async def open_loop(
    send: Callable[[int], Awaitable[Answered]], requests: int, rate: float, seed: int = 0
) -> list[Answered]:
    """`requests` requests that arrive as a Poisson process, `rate` per second on average."""
    gaps, tasks = random.Random(seed), []
    for number in range(requests):
        tasks.append(asyncio.ensure_future(send(number)))
        if number + 1 < requests:
            await asyncio.sleep(gaps.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def requests_of(prompts: Sequence[Any], fields: dict[str, Any], *, chat: bool, seed: int = 0) -> Ask:
    """Prompts in turn, each request with a seed of its own."""

    def fields_of(number: int) -> dict[str, Any]:
        prompt = prompts[number % len(prompts)]
        asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        return {**fields, **asked, "seed": seed + number}

    return fields_of
