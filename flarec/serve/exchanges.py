"""One HTTP request on the event loop: its jobs, and what the worker says about them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from .jobs import Job, News
from .refusals import HttpRefusal
from .worker import Worker


class Exchanges:
    """Where the worker's news go. Lives on the event loop.

    `publish` may be called on any thread, also when the loop is gone: then nobody is left to be told.
    """

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._of: dict[Job, Exchange] = {}

    def publish(self, news: list[News]) -> None:
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed
                self.loop.call_soon_threadsafe(self._deliver, news)

    def _deliver(self, news: list[News]) -> None:
        for item in news:
            ended = item.finish is not None or item.refusal is not None
            exchange = self._of.pop(item.job, None) if ended else self._of.get(item.job)
            if exchange is not None:
                exchange.box.append(item)
                exchange.changed.set()

    def open(self, worker: Worker, jobs: Sequence[Job]) -> Exchange:
        """Give the jobs to the worker. Raises `HttpRefusal`."""
        exchange = Exchange(worker, jobs)
        self._of.update(dict.fromkeys(jobs, exchange))
        try:
            worker.submit(jobs)
        except HttpRefusal:
            self.forget(exchange)
            raise
        return exchange

    def forget(self, exchange: Exchange) -> None:
        for job in exchange.jobs:
            self._of.pop(job, None)


class Exchange:
    """Jobs of one HTTP request, and the news about them that nobody has read yet."""

    def __init__(self, worker: Worker, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self.box: list[News] = []
        self.changed = asyncio.Event()
        self._worker = worker
        self._left = set(jobs)

    async def news(self) -> AsyncIterator[list[News]]:
        """What happened since the last time, until all jobs have ended. Raises `HttpRefusal` if one cannot be served;
        the others are then cancelled."""
        while self._left:
            await self.changed.wait()
            self.changed.clear()
            items, self.box = self.box, []
            for item in items:
                if item.refusal is not None:
                    self._left.discard(item.job)
                    self.cancel()
                    raise item.refusal
                if item.finish is not None:
                    self._left.discard(item.job)
            yield items

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        if self._left:
            self._worker.cancel(list(self._left))
            self._left.clear()
