"""The thread that owns the engine: requests come in through a box, what happens to them goes out step by step.

Nothing but this thread touches the engine. After every step all news go to the event loop in one call, whatever their
number, so that the loop wakes up once per step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter as clock

from flarec.decode import TextStream
from flarec.decode.request import Request, TokenLogprob
from flarec.decode.tokenizing import ByteFallback
from flarec.errors import GenerationError, first_line

from .jobs import Job, News
from .meter import Meter
from .prompts import Served
from .refusals import HttpRefusal

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


class Worker:
    """The engine's thread.

    model    what is served
    meter    is told what happens
    publish  gets the news of a step; called on this thread
    queue    jobs that may wait or run at the same time; more are refused
    """

    def __init__(self, model: Served, meter: Meter, publish: Callable[[list[News]], None], queue: int) -> None:
        self.model, self.engine, self.meter = model, model.engine, meter
        self.publish = publish
        self.queue = queue
        self.settled = ByteFallback(model.tokenizer).settled
        self.open: set[Job] = set()
        self._changed = threading.Condition()
        self._box: list[Callable[[], None]] = []
        self._closing = False
        self._running: dict[Request, Job] = {}
        self._news: list[News] = []
        self._thread = threading.Thread(target=self._run, name="flarec-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs of one request, all or none. Raises `HttpRefusal`."""
        with self._changed:
            if self._closing:
                raise HttpRefusal(503, "the server is shutting down", code="shutting_down")
            if len(self.open) + len(jobs) > self.queue:
                raise HttpRefusal(
                    429, f"the server is full: {len(self.open)} generations run or wait, and at most {self.queue} may; "
                    "try again later", code="queue_full", headers={"Retry-After": "1"},
                )
            self.open |= set(jobs)
            self._box += [partial(self._add, job) for job in jobs]
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs where they are; those that have ended stay as they are."""
        with self._changed:
            self._box += [partial(self._cancel, job) for job in jobs]
            self._changed.notify()

    def close(self) -> None:
        """Cancel what is left, and wait for the thread to end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._box or self._closing or self.engine.busy):
                    self._changed.wait()
                box, self._box = self._box, []
                closing = self._closing
            for action in box:
                action()
            if closing:
                for job in list(self.open):
                    self._cancel(job)
            else:
                self._step()
            self._tell()
            if closing:
                self.engine.reset()
                return

    def _step(self) -> None:
        try:
            for request in self.engine.step():
                self._end(self._running[request])
        except Exception as error:  # of a device, or a fault of ours: nobody knows what the requests hold
            self.engine.reset()
            self.meter.failures += 1
            for job in list(self.open):
                if job.request is not None:
                    self._close(job, News(job, refusal=HttpRefusal(500, f"the engine failed: {first_line(error)}")))

    def _add(self, job: Job) -> None:
        text = TextStream(self.model.decode, job.options.stop, self.settled)

        def tell(index: int, tokens: list[int]) -> None:
            self._tokens(job, text.push(tokens))

        try:
            job.request = self.engine.add(
                job.prompt, job.options, stop_check=text.stop_check if job.options.stop else None, on_tokens=tell,
                logprobs=job.logprobs,
            )
        except Exception as error:  # nothing that one request brings may end this thread
            status = 400 if isinstance(error, GenerationError) else 500
            self._close(job, News(job, refusal=HttpRefusal(status, first_line(error))))
            return
        job.text = text
        self._running[job.request] = job
        self.meter.prompt_tokens += len(job.prompt)
        self._news.append(News(job))

    def _tokens(self, job: Job, text: str) -> None:
        """A step gave a job tokens."""
        assert job.request is not None
        if job.first is None:
            job.first = clock()
            self.meter.first_token.observe(job.first - job.given)
        if not job.request.finished:  # what ends a job is told with its end
            self._news.append(News(job, text, len(job.request.tokens), self._chosen(job)))
        elif text:
            job.held = text

    def _chosen(self, job: Job) -> list[tuple[int, TokenLogprob]]:
        request = job.request
        if request is None or request.logprobs is None:
            return []
        new = list(zip(request.tokens[job.told :], request.chosen[job.told :], strict=True))
        job.told = len(request.tokens)
        return new

    def _end(self, job: Job) -> None:
        """The engine has ended it."""
        request = job.request
        assert request is not None and job.text is not None and request.stop_reason is not None
        if request.failure is not None:
            self._close(job, News(job, refusal=HttpRefusal(500, first_line(request.failure))))
            return
        rest = job.held + job.text.finish()
        finish = FINISH[request.stop_reason]
        self._close(job, News(job, rest, len(request.tokens), self._chosen(job), finish))

    def _cancel(self, job: Job) -> None:
        if job.ended:
            return
        if job.request is not None:
            self.engine.cancel(job.request)
        self._close(job, News(job, finish="cancelled"))

    def _close(self, job: Job, news: News) -> None:
        job.ended = True
        self.meter.ended(job, news)
        if job.request is not None:
            self._running.pop(job.request, None)
        with self._changed:
            self.open.discard(job)
        self._news.append(news)

    def _tell(self) -> None:
        news, self._news = self._news, []
        if news:
            self.publish(news)
