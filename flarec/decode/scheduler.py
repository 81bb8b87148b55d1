"""Continuous batching: requests wait, are prefilled in chunks beside those that run, join them, and leave.

Requests in one mode with the same settings share a lane; lanes take turns. Which requests meet in a forward changes
their speed and nothing else.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence

import torch

from flarec.kernels.sampling import mask_of

from .graphs import StaticRows
from .pieces import PieceLayouts
from .plan import DecodeProgram, StepPlan, StepShape
from .prefill import Prefill, chunk_ends, whole_pages
from .prefix import Prefix, PrefixCache
from .request import Request
from .rows import Mode, Rows
from .stats import DecodeStats
from .stores import Stores

PREFILL_ROWS = 8192
"""Clean rows of one prefill forward, all requests together: bounds its memory."""
CANCELLED = "cancelled"


class Lane:
    """The requests that step together, those whose prompts are being read, and those that wait.

    stores: buffers for steps as graphs; None: steps are run
    alone: clean rows of a prefill forward, all requests together, while nothing runs beside it; 0: a chunk of each
    prefixes: prompts that were read before; None: they are read anew. With it chunks are whole pages
    reader: gives what reads prompts in the place of the program, for the one that is read next
    read: the prefill behind which the first step is taken now
    bare: runs steps without noisy rows in the place of the program; None: the program does
    queued: whether a piece of a prompt, of any lane, is queued and nobody has waited for it yet: who reads results next
    waits for it as well
    """

    def __init__(
        self,
        program: DecodeProgram,
        mode: Mode,
        suppress: Sequence[int],
        slots: int,
        chunk: int,
        stats: DecodeStats,
        stores: Stores | None = None,
        prefixes: PrefixCache | None = None,
        reader: Callable[[DecodeProgram], DecodeProgram] = lambda program: program,
        alone: int = 0,
        bare: DecodeProgram | None = None,
    ) -> None:
        self.program = program
        self.reader = reader
        self.mode = mode
        self.suppress = mask_of(suppress, program.vocab_size, program.device) if suppress else None
        self.slots = slots
        self.page = prefixes.page if prefixes is not None else 1
        self.chunk = whole_pages(chunk, self.page)
        self.alone = alone
        self.bare = bare if bare is not program else None
        self.prefixes = prefixes
        self.stats = stats
        self.stores = stores
        self.waiting: deque[Request] = deque()
        self.reading: Prefill | None = None
        self.read: Prefill | None = None
        self.running: Rows | None = None
        self.queued = False
        self._plans: dict[StepShape, StepPlan] = {}
        self._layouts = PieceLayouts(program.device)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.running)

    @torch.no_grad()
    def step(self, beside: bool = False) -> list[Request]:
        """One forward of the running requests, and one of a prefill (all of it if none run). beside: requests of other
        lanes run. Returns who ended."""
        ended: list[Request] = []
        self.running = self._left(self.running, ended)  # who was cancelled
        start = time.perf_counter()
        fresh = self._admitted(ended, beside)
        middle = time.perf_counter()
        if self.running is None and self.stores is None:
            self.running, fresh = fresh, None
        # neither its one step by itself is a measure, nor one that waits for a prefill
        for rows, timed in ((self.running, not self.queued), (fresh, False)):
            if rows is not None:
                rows.timed = timed
                rows.step()
                rows.timed, self.queued = True, False
                self.stats.steps += 1
        if self.read is not None:
            self.read.keep_committed()
            self.read = None
        self.running, fresh = self._left(self.running, ended), self._left(fresh, ended)
        if fresh is not None:
            self._join(fresh)
        self.stats.prefill_seconds += middle - start
        self.stats.step_seconds += time.perf_counter() - middle
        return ended

    def close(self) -> None:
        """Nothing of it will run any more."""
        if isinstance(self.running, StaticRows) and self.stores is not None:
            self.stores.give_back(self.running.store)
        self.running = None

    def _join(self, fresh: Rows) -> None:
        """Requests that have stepped once join those that run."""
        if self.stores is None:
            if self.running is None:
                self.running = fresh
            else:
                self.running.join(fresh)
            return
        running, count = self.running, len(fresh.requests)
        assert running is None or isinstance(running, StaticRows)
        capacity = max(len(request.prompt) + request.limit for request in fresh.requests) + self.mode.pending
        if running is None or not running.fits(count, capacity):
            held = 0 if running is None else len(running.requests)
            store = self.stores.take(fresh, held + count, min(self.slots, held + count + len(self.waiting)),
                                     max(capacity, 0 if running is None else running.store.cache.capacity))
            larger = StaticRows(store, fresh, self.stats)
            if running is not None:
                larger.join(running.exposed())
            running = self.running = larger
        running.join(fresh)

    def _admitted(self, ended: list[Request], beside: bool) -> Rows | None:
        """Requests whose prompts have just been read, if there are any."""
        alone = self.running is None and not beside
        if self.reading is None:
            program = self.reader(self.program)
            known = self._group(self.slots - (len(self.running.requests) if self.running else 0), program)
            if not known:
                return None
            group = list(known)
            self.stats.prompt_tokens += sum(len(request.prompt) for request in group)
            self.stats.known_tokens += sum(prefix.length for prefix in known.values())
            options = [request.options for request in group]
            rows = Rows(self.program, self.mode, group, options, self.suppress, self._plans, self._layouts)
            rows.bare = self.bare
            self.reading = Prefill(rows, self.chunk, self.prefixes, list(known.values()), program)
        if all(request.finished for request in self.reading.rows.requests):
            self.reading = None
            return None
        before = self.reading.forwards
        while not (done := self.reading.advance(self.alone if alone else 0)) and alone:
            pass
        self.stats.prefills += self.reading.forwards - before
        self.queued = not done  # the first tokens were read
        if not done:
            return None
        read, self.reading = self.reading, None
        fresh = self._left(read.rows, ended)
        self.read = None if fresh is None else read
        return fresh

    def _group(self, free: int, program: DecodeProgram) -> dict[Request, Prefix]:
        """Who is read next, with what the program knows of each prompt: the one that waits longest, and others whose
        prompts take as many forwards."""
        while self.waiting and self.waiting[0].finished:
            self.waiting.popleft()
        if not self.waiting or free < 1:
            return {}
        group: dict[Request, Prefix] = {}
        chunks, widest = 0, 0  # of each, and tokens of the longest one
        rest: deque[Request] = deque()
        for request in self.waiting:
            if len(group) < free and (len(group) + 1) * widest <= PREFILL_ROWS and not request.finished:
                known = Prefix()
                if self.prefixes is not None:
                    known = self.prefixes.find(program, request.prompt, self.mode.blocks)
                ends = chunk_ends(len(request.prompt), self.chunk, known, self.page)
                wide = max(widest, min(self.chunk, len(request.prompt) - known.length))
                if not group or (chunks == len(ends) and (len(group) + 1) * wide <= PREFILL_ROWS):
                    group[request], chunks, widest = known, len(ends), wide
                    continue
            rest.append(request)
        self.waiting = rest
        return group

    def _left(self, rows: Rows | None, ended: list[Request]) -> Rows | None:
        """The rows without those that have ended; None if nobody is left."""
        if rows is None:
            return None
        gone = [request for request in rows.requests if request.finished]
        if not gone:  # most steps end nobody
            return rows
        self.stats.tokens += sum(len(request.tokens) for request in gone)
        self.stats.taken_back += sum(request.taken_back for request in gone)
        ended += [request for request in gone if request.stop_reason != CANCELLED]
        if len(gone) < len(rows.requests):
            rows.retire()
            return rows
        if isinstance(rows, StaticRows) and self.stores is not None:
            self.stores.give_back(rows.store)
        return None


class Scheduler:
    """Lanes by what their requests have in common; `lane` makes one for a request and its key."""

    def __init__(self, lane: Callable[[Request, Hashable], Lane], key: Callable[[Request], Hashable]) -> None:
        self._lane = lane
        self._key = key
        self.lanes: dict[Hashable, Lane] = {}
        self._queued = False

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return any(lane.busy for lane in self.lanes.values())

    def add(self, request: Request) -> None:
        key = self._key(request)
        if key not in self.lanes:
            self.lanes[key] = self._lane(request, key)
        self.lanes[key].waiting.append(request)

    def step(self) -> list[Request]:
        """One step of every lane. Returns the requests that ended by themselves."""
        lanes, ended = list(self.lanes.values()), list[Request]()
        for lane in lanes:
            lane.queued = self._queued
            ended += lane.step(any(other.running for other in lanes if other is not lane))
            self._queued = lane.queued
        if not all(lane.busy for lane in lanes):
            self.lanes = {key: lane for key, lane in self.lanes.items() if lane.busy}
        return ended

    def close(self) -> None:
        """Give up everything that waits or runs."""
        for lane in self.lanes.values():
            lane.close()
        self.lanes.clear()
