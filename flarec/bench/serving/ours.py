"""Steps of the engine in steady state: everything between two reports, the copy to the host included."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flarec.base.generation import GenerationOptions
from flarec.base.generation import Mode as ModeName
from flarec.decode import Engine
from flarec.decode.modes.ar_trust import ARTrustMode
from flarec.decode.prefill import Prefill
from flarec.decode.rows import Mode, Rows
from flarec.kernels.sampling import choose

from ..measure import NotMeasured
from .models import TURNS, ServingSession

WARM_STEPS = 6  # run, checked, captured, and a few more
STEPS_OF_A_TURN = 20
AUTO_SECONDS = 60.0
"""Of `--drafts auto` with one number of requests, after which no other acceptance is begun."""
AUTO_STEPS, TURN, AUTO_WARM = 1536, 8, 64
"""Steps of `--drafts auto`, and as many causal ones; of each in turn; and before them. Many: what a policy may
lose once is no steady state."""
AUTO_TOKENS = 1 << 13
"""Of each request: more than that many steps make."""
SETTLED = 16
"""Replays behind a recorded step that are no steady state: the device had nothing to do for seconds."""


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step (the lowest and the highest of some medians), waits for the device in it, and whether it
    was the replay of a graph."""

    ms: float
    slowest_ms: float
    waits: float
    replayed: bool


@dataclass(frozen=True)
class StepKind:
    """What steps: a mode, tokens of a prompt (None: the session's), and whether steps are replayed."""

    mode: ModeName
    context: int | None = None
    graphs: str = "auto"


PAIR = (StepKind("causal"), StepKind("ar-trust"))
"""Compared by rows, and so measured in turns."""


def step_time(session: ServingSession, mode: ModeName, requests: int, *, graphs: str = "auto") -> StepTime:
    """A step of `requests` requests in one mode. The shape of a step does not depend on what is accepted."""
    kind = StepKind(mode, graphs=graphs)
    kinds = PAIR if kind in PAIR else (kind,)
    return step_times(session, requests, kinds)[kinds.index(kind)]


def step_times(session: ServingSession, requests: int, kinds: tuple[StepKind, ...]) -> tuple[StepTime, ...]:
    """Steps of several kinds, in short turns: the state of host and device changes within seconds, by a twentieth of a
    step, and is the same for all of them then."""
    graphs = all(kind.graphs == "auto" for kind in kinds)
    steps = session.steps if graphs else min(session.steps, 20)

    def measure() -> tuple[StepTime, ...]:
        engines = [_running(session, requests, kind) for kind in kinds]
        before = [engine.stats.replays for engine in engines]
        rounds = in_turns([engine.step for engine in engines], steps, TURNS if session.on_gpu and graphs else 1)
        best, ran = min(rounds, key=sum), steps * len(rounds)
        # where the caches grow once, a few steps are run before theirs is recorded
        replayed = [
            engine.stats.replays - count >= ran - 2 * WARM_STEPS for engine, count in zip(engines, before, strict=True)
        ]
        return tuple(
            StepTime(best[place], max(each[place] for each in rounds), _waits(session, engine.step), replayed[place])
            for place, engine in enumerate(engines)
        )

    return session.measured(("steps", requests, kinds), measure)


def _running(session: ServingSession, requests: int, kind: StepKind) -> Engine:
    """An engine in steady state."""
    engine = session.engine(requests, graphs=kind.graphs)
    options = GenerationOptions(mode=kind.mode, max_new_tokens=1 << 14, threshold=1.0)
    running = [engine.add(prompt, options) for prompt in session.prompts(requests, kind.context)]
    while any(not request.tokens for request in running):
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    session.wait()
    return engine


def in_turns(steps: Sequence[Callable[[], object]], count: int, rounds: int) -> list[list[float]]:
    """Of each round the medians of `count` steps of each kind, in milliseconds, a few at a time."""
    found = []
    for _ in range(rounds):
        times: list[list[float]] = [[] for _ in steps]
        while (left := count - len(times[0])) > 0:
            for step, mine in zip(steps, times, strict=True):
                mine += [_ms(step) for _ in range(min(STEPS_OF_A_TURN, left))]
        found.append([statistics.median(mine) for mine in times])
    return found


def _ms(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def _waits(session: ServingSession, step: object, count: int = 5) -> float:
    """Per step: the waits that CUDA's debug mode reports, and the event behind which the result lies."""
    assert callable(step)
    if not session.on_gpu:
        return 0.0
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(count):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return 1 + sum("synchroniz" in str(item.message) for item in found) / count


def prefill_ms(session: ServingSession, tokens: int, chunk: int | None = None, *, early: bool = False) -> float:
    """One prompt, read in forwards of `chunk` tokens (None: in one); the fastest of three.

    early: as an engine reads its first prompts, else as it does after many, which is compiled if steps are.
    """

    def once() -> float:
        read = reading(session, tokens, chunk, early=early)
        session.wait()
        start = time.perf_counter()
        read()
        session.wait()
        return 1e3 * (time.perf_counter() - start)

    def measure() -> float:
        once()  # may compile
        return min(once() for _ in range(3))

    return session.measured(("prefill", tokens, chunk, early), measure)


@torch.no_grad()
def reading(session: ServingSession, tokens: int, chunk: int | None, *, early: bool) -> Callable[[], None]:
    """The forwards of `prefill_ms`, once."""
    engine = session.engine(1)
    request = engine.add(session.prompts(1, tokens)[0], mode="causal", max_new_tokens=2)
    rows = Rows(session.program, engine._mode(request.options), [request], [request.options], None)
    program = session.program if early else session.reader(session.program)
    prefill = Prefill(rows, chunk or tokens, program=program)

    @torch.no_grad()
    def read() -> None:
        while not prefill.advance():
            pass

    return read


def engine_prefill_ms(session: ServingSession, tokens: int, *, early: bool) -> float:
    """As an engine reads one prompt while nothing else runs: from `Engine.add` until the host has its first token; the
    fastest of three. early: as its first prompts."""

    def measure() -> float:
        engine = session.reading_engine(1, early=early)
        return min(_first_token_ms(session, engine, tokens)[0] for _ in range(4))  # the first may compile

    return session.measured(("engine prefill", tokens, early), measure)


@dataclass(frozen=True)
class KeptPrefill:
    """As `engine_prefill_ms`, with a prefix cache and without one: milliseconds and forwards of a prompt that is not
    known; known_ms: with the prefix cache once more, when all of it is."""

    ms: float
    forwards: int
    plain_ms: float
    plain_forwards: int
    known_ms: float


def kept_prefill(session: ServingSession, tokens: int, limit: int = 1 << 30) -> KeptPrefill:
    """In turns, on one engine; the fastest of three. limit: bytes of the prefix cache."""

    def measure() -> KeptPrefill:
        engine = session.reading_engine(1, early=False)
        found: list[list[float]] = [[], [], []]
        forwards = [0, 0, 0]
        for _ in range(4):  # the first may compile
            for place, (kept, again) in enumerate(((limit, False), (limit, True), (0, False))):
                if not again:
                    engine.keep_prefixes(kept)  # knows nothing
                before = engine.stats.prefills
                found[place].append(_first_token_ms(session, engine, tokens)[0])
                forwards[place] = engine.stats.prefills - before
        read, known, plain = map(min, found)
        return KeptPrefill(read, forwards[0], plain, forwards[2], known)

    return session.measured(("kept prefill", tokens, limit), measure)


@dataclass(frozen=True)
class Beside:
    """A prompt that is read beside a request that decodes causally: milliseconds until its first token, and of that
    request's steps: how many there were, the longest, and one with nothing beside it."""

    ms: float
    steps: int
    longest_ms: float
    alone_ms: float


def beside(session: ServingSession, tokens: int) -> Beside:
    """The fastest of three."""

    def measure() -> Beside:
        engine = session.reading_engine(2, early=False)
        engine.add(session.prompts(1)[0], mode="causal", max_new_tokens=1 << 14)
        found = []
        for _ in range(4):  # the first may compile
            times = [_ms(engine.step) for _ in range(4 * WARM_STEPS)]
            alone = statistics.median(times[2 * WARM_STEPS :])
            ms, steps = _first_token_ms(session, engine, tokens)
            # the last one holds the first step of the prompt's own request
            found.append(Beside(ms, len(steps), max(steps[:-1], default=ms), alone))
        return min(found, key=lambda one: one.ms)

    return session.measured(("beside", tokens), measure)


def _first_token_ms(session: ServingSession, engine: Engine, tokens: int) -> tuple[float, list[float]]:
    """(milliseconds from `Engine.add` of a prompt to its first token on the host, those of the engine's steps)."""
    arrived: list[float] = []
    prompt = session.prompts(1, tokens)[0]
    session.wait()
    start = time.perf_counter()
    request = engine.add(
        prompt, mode="causal", max_new_tokens=2, on_tokens=lambda *_: arrived.append(time.perf_counter())
    )
    steps = []
    while not arrived:
        steps.append(_ms(engine.step))
    while not request.finished:
        engine.step()
    session.wait()
    return 1e3 * (arrived[0] - start), steps


def sampler(session: ServingSession, rows: int) -> Callable[[], tuple[Tensor, ...]]:
    """The choice of a token at temperature 0.7, top-k 20, top-p 0.95 for `rows` rows of float32 logits."""
    device = session.device
    logits = 3 * torch.randn(rows, session.vocabulary, device=device)
    place = torch.arange(rows, device=device)
    temperature, top_p = torch.full((rows,), 0.7, device=device), torch.full((rows,), 0.95, device=device)
    top_k = torch.full((rows,), 20, device=device)
    given = (logits, temperature, top_k, top_p, place, place)
    return lambda: choose(*given, confidence=False)


def sampling_ms(session: ServingSession, rows: int) -> float:
    """Milliseconds of `sampler`."""
    return session.measured(("sampling", rows), lambda: session.clock.graph_ms([sampler(session, rows)]))


class ReplayedAcceptance(ARTrustMode):
    """Drafts are right with a given probability, whatever the logits say: a hash of the row's position decides.

    All work of a step is done. share [1] float32 on the device, so that graphs follow it.
    """

    share: Tensor

    def judge(self, rows: Rows, drafts: Tensor, choice: Tensor) -> Tensor:
        place = rows.cache.length[:, None] + torch.arange(drafts.shape[1], device=rows.device)
        place = place * 7919 + 104729 * torch.arange(len(drafts), device=rows.device)[:, None]
        mixed = (place * 2654435761) % 4294967296
        mixed = ((mixed // 65536) ^ mixed) * 2246822519 % 4294967296
        return ((mixed // 256) % 65536).float() < 65536 * self.share


def share_of(tokens: float, block: int) -> float:
    """The probability at which `block` drafts yield this many tokens per step."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(block + 1)) < tokens else (low, middle)
    return low


class ReplayingEngine(Engine):
    """Chooses how much to draft (`--drafts auto`) over replayed acceptance."""

    share: Tensor

    def _mode(self, options: GenerationOptions, key: Hashable = None) -> Mode:
        mode = super()._mode(options, key)
        if isinstance(mode, ARTrustMode):
            replayed = ReplayedAcceptance(mode.blocks, branches=mode.branches, policy=mode.policy)
            replayed.share = self.share
            return replayed
        return mode


@dataclass(frozen=True)
class Chosen:
    """Tokens per second of `--drafts auto` to those of causal steps; within: half of its 95 % interval, by turns."""

    ratio: float
    within: float


def chosen_rates(session: ServingSession, requests: int, wanted: Sequence[float]) -> dict[float, Chosen]:
    """`--drafts auto` to causal steps by tokens per forward of whole blocks.

    In short turns, so that both meet the same host, and from the same prompts on. In steady state: a step that is run
    because its graph is not recorded yet (once per blocks and capacity of the caches) is left out, with its tokens, and
    so are `SETTLED` replays behind it; trials of other blocks are in. Ends early after `AUTO_SECONDS`, with those that
    were reached.
    """

    def measure() -> dict[float, Chosen]:
        auto, plain = _auto_engines(session, requests)
        turns = -(-max(session.steps, AUTO_STEPS) // TURN) if session.on_gpu else 1
        size = TURN if session.on_gpu else session.steps
        found: dict[float, Chosen] = {}
        begun = time.perf_counter()
        for tokens in wanted:
            if found and time.perf_counter() - begun > AUTO_SECONDS:
                break
            auto.share.fill_(share_of(tokens, session.block))
            mine, theirs = Decoding(session, auto, requests, "ar-trust"), Decoding(session, plain, requests, "causal")
            each = []
            for _ in range(turns):
                theirs.take(size)
                mine.take(size)
                each.append(mine.last / theirs.last)
            spread = statistics.stdev(each) if turns > 1 else 0.0
            found[tokens] = Chosen(mine.rate / theirs.rate, 1.96 * spread / len(each) ** 0.5)
            mine.end()
            theirs.end()
        return found

    return session.measured(("chosen", requests, tuple(wanted)), measure)


def _auto_engines(session: ServingSession, requests: int) -> tuple[ReplayingEngine, Engine]:
    """One pair for all acceptances: what was recorded and learned serves the next one."""

    def make() -> tuple[ReplayingEngine, Engine]:
        auto = session.engine(requests, kind=ReplayingEngine, dynamic=True)
        plain = session.engine(requests, dynamic=True)
        assert isinstance(auto, ReplayingEngine)
        auto.share = torch.zeros(1, device=session.device)
        return auto, plain

    return session.measured(("auto engines", requests), make)


class Decoding:
    """Requests that an engine has begun to serve: what it makes of them in steady state, and in how many seconds.

    rate, last: tokens per second, of all and of the last turn.
    """

    def __init__(self, session: ServingSession, engine: Engine, requests: int, mode: ModeName) -> None:
        self.session, self.engine = session, engine
        options = GenerationOptions(mode=mode, drafts="auto", max_new_tokens=AUTO_TOKENS)
        self.running = [engine.add(prompt, options) for prompt in session.prompts(requests)]
        self.made, self.seconds, self.last, self.settling = 0, 0.0, 0.0, 0
        while any(not request.tokens for request in self.running):
            engine.step()
        warm = AUTO_WARM if mode == "ar-trust" else WARM_STEPS
        for _ in range(warm):  # records graphs, finds out what pays
            engine.step()

    @property
    def rate(self) -> float:
        return self.made / self.seconds

    def take(self, steps: int) -> None:
        """So many steps that are replays of graphs, and not soon behind a recorded one, or, where there are none, that
        are run. Raises `NotMeasured` if a request ends meanwhile: the others' steps are another kind."""
        counted, stats, made, seconds = 0, self.engine.stats, 0, 0.0
        self.session.wait()
        while counted < steps:
            before = sum(len(request.tokens) for request in self.running)
            replays, graphs, start = stats.replays, stats.graphs, time.perf_counter()
            self.engine.step()
            took = time.perf_counter() - start
            if any(request.finished for request in self.running):
                tokens = max(len(request.tokens) for request in self.running)
                raise NotMeasured(f"a request ended after {tokens} tokens, before {steps} more steps were timed")
            replayed = stats.replays > replays and stats.graphs == graphs
            self.settling = max(0, self.settling - 1) if replayed else SETTLED
            if (replayed and not self.settling) or not stats.graphs:
                made += sum(len(request.tokens) for request in self.running) - before
                seconds, counted = seconds + took, counted + 1
        self.made, self.seconds, self.last = self.made + made, self.seconds + seconds, made / seconds

    def end(self) -> None:
        """Contexts stay near those of others: the next requests begin anew."""
        for request in self.running:
            self.engine.cancel(request)
        self.engine.step()
