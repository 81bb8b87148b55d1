"""The rows of `flarec bench decode`, with what is required of them (ratios within one run)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...base.generation import Mode
from ...decode.engine import chunk_on
from ..measure import NotMeasured
from ..session import Case, Measured, Session, named
from . import first_token, ours, stock
from .models import ServingSession

TOKENS_PER_FORWARD = 2.65
"""Of AR-Trust, where a rate is wanted: what the demo reaches. A step costs the same whatever it accepts."""
REQUESTS = (1, 8, 32)
AUTO = (8, 64, 1)
LOW, HIGH = (1.0, 1.5), (2.65, 3.5)
"""Tokens per step of whole blocks that are replayed: where drafts may not pay, and where they do."""
LONG = 32768
PROMPT = 8192
ALONE: tuple[Mode, ...] = ("causal", "ar-trust", "diffusion-trust")
"""Modes of a model that has no horizon head."""
Measure = Callable[[ServingSession], Measured]


def _causal(requests: int) -> Measure:
    def measure(session: ServingSession) -> Measured:
        mine, theirs = ours.step_time(session, "causal", requests), stock.graph_step_ms(session, requests)
        return Measured(mine.ms / theirs, {"ours_ms": mine.ms, "stock_graph_ms": theirs}, _notes(mine))

    return measure


def _trusted(requests: int) -> Measure:
    def measure(session: ServingSession) -> Measured:
        mine, plain = ours.step_time(session, "ar-trust", requests), ours.step_time(session, "causal", requests)
        return Measured(mine.ms / plain.ms, {"ar_trust_ms": mine.ms, "causal_ms": plain.ms}, _notes(mine))

    return measure


def _rate(requests: int) -> Measure:
    def measure(session: ServingSession) -> Measured:
        mine, theirs = ours.step_time(session, "ar-trust", requests), stock.graph_step_ms(session, requests)
        mine_rate, their_rate = 1e3 * requests * TOKENS_PER_FORWARD / mine.ms, 1e3 * requests / theirs
        values: dict[str, float | None] = {"tokens_per_s": mine_rate, "stock_graph_tokens_per_s": their_rate}
        return Measured(mine_rate / their_rate, values, _notes(mine))

    return measure


def _long(session: ServingSession) -> Measured:
    tokens = LONG if session.on_gpu else 4 * session.context
    kinds = tuple(ours.StepKind("ar-trust", size) for size in (tokens, session.context))
    far, near = ours.step_times(session, 1, kinds)
    return Measured(far.ms / near.ms, {"long_ms": far.ms, "short_ms": near.ms, "context": float(tokens)}, _notes(far))


def _sampling(session: ServingSession) -> Measured:
    return Measured(ours.sampling_ms(session, 16))


def _prefill(*, early: bool) -> Measure:
    """In one forward, and in pieces as long as an engine's beside running requests."""

    def measure(session: ServingSession) -> Measured:
        tokens, chunk = PROMPT if session.on_gpu else session.context, chunk_on(session.device)
        mine, theirs = ours.prefill_ms(session, tokens, early=early), stock.prefill_ms(session, tokens)
        return Measured(mine / theirs, {
            "ours_ms": mine,
            "stock_ms": theirs,
            "in_chunks_ms": ours.prefill_ms(session, tokens, chunk, early=early),
            "chunk": float(chunk),
            "tokens": float(tokens),
        })

    return measure


def _engine_prefill(session: ServingSession) -> Measured:
    """From a request to its first token, as an engine reads a prompt while nothing else runs."""
    tokens = PROMPT if session.on_gpu else session.context
    first, mine = (ours.engine_prefill_ms(session, tokens, early=early) for early in (True, False))
    theirs = stock.prefill_ms(session, tokens)
    return Measured(
        mine / theirs, {"ours_ms": mine, "first_prompts_ms": first, "stock_ms": theirs, "tokens": float(tokens)}
    )


def _kept_prefill(session: ServingSession) -> Measured:
    """The same engine with a prefix cache of 1 GiB to without one."""
    tokens = PROMPT if session.on_gpu else session.context
    found = ours.kept_prefill(session, tokens)
    return Measured(found.ms / found.plain_ms, {
        "with_ms": found.ms, "without_ms": found.plain_ms, "known_ms": found.known_ms, "tokens": float(tokens),
        "forwards_with": float(found.forwards), "forwards_without": float(found.plain_forwards),
    })


def _beside(session: ServingSession) -> Measured:
    tokens = PROMPT if session.on_gpu else session.context
    found = ours.beside(session, tokens)
    return Measured(found.ms, {
        "steps": float(found.steps), "longest_step_ms": found.longest_ms, "step_alone_ms": found.alone_ms,
        "chunk": float(chunk_on(session.device)), "tokens": float(tokens),
    })


def _waits(session: ServingSession) -> Measured:
    if not session.on_gpu:
        raise NotMeasured("waits are counted on CUDA devices")
    found: dict[str, float | None] = {mode: ours.step_time(session, mode, 1).waits for mode in ALONE}
    return Measured(max(value for value in found.values() if value is not None), found)


def _alone(mode: Mode, requests: int, graphs: str = "auto") -> Measure:
    def measure(session: ServingSession) -> Measured:
        mine = ours.step_time(session, mode, requests, graphs=graphs)
        return Measured(mine.ms, {}, () if graphs == "off" else _notes(mine))

    return measure


def _chosen(requests: int, wanted: Sequence[float]) -> Measure:
    """The lowest of some acceptances."""

    def measure(session: ServingSession) -> Measured:
        found = ours.chosen_rates(session, requests, wanted)
        notes = () if len(found) == len(wanted) else (f"of {len(wanted)} acceptances, for lack of time",)
        values: dict[str, float | None] = {}
        for tokens, one in found.items():
            values |= {f"{tokens:g} per step": one.ratio, f"{tokens:g} per step, within": one.within}
        return Measured(min(one.ratio for one in found.values()), values, notes)

    return measure


def _first_token(name: str) -> Measure:
    def measure(session: ServingSession) -> Measured:
        found = first_token.measured(session)[name]
        return Measured(found["replayed"], dict(found))

    return measure


def _generate(requests: int) -> Measure:
    return lambda session: Measured(stock.generate_ms(session, requests))


def _notes(step: ours.StepTime) -> tuple[str, ...]:
    spread = () if step.slowest_ms < 1.05 * step.ms else (f"medians of up to {step.slowest_ms:.3f} ms",)
    return spread if step.replayed else (*spread, "steps were run, not replayed")


def _row(name: str, title: str, measure: Measure, bar: float | None = None, aim: float | None = None,
         *, unit: str = "x", at_least: bool = False) -> Case:
    def of_session(session: Session) -> Measured:
        assert isinstance(session, ServingSession)
        return measure(session)

    return Case(name, title, of_session, lambda session: None, unit, bar, aim, at_least)


TRUSTED = {1: (1.12, 1.05), 8: (1.2, 1.12), 32: (2.2, 1.8)}
RATES = {1: (4.0, 6.0), 8: (3.2, 4.5), 32: (2.0, 2.8)}
ROWS: tuple[Case, ...] = (
    _row("causal-step-1", "causal step to stock graph, C = 1", _causal(1), 0.5, 0.35),
    _row("sampling-16", "16 rows, top-k and top-p", _sampling, 0.15, 0.08, unit="ms"),
    *(
        row for c in REQUESTS for row in (
            _row(f"ar-trust-step-{c}", f"AR-Trust step to causal step, C = {c}", _trusted(c), *TRUSTED[c]),
            _row(f"ar-trust-rate-{c}", f"AR-Trust tokens/s to stock graph, C = {c}", _rate(c), *RATES[c],
                 at_least=True),
        )
    ),
    _row("long-context", "AR-Trust step at 32k context to 512", _long, 1.2, 1.08),
    _row("prefill", "prefill of 8k tokens to stock", _prefill(early=False), 1.1, 0.9),
    _row("prefill-first", "prefill of 8k tokens to stock, as first prompts are read", _prefill(early=True)),
    _row("engine-prefill", "8k tokens until the first one, by the engine, to stock prefill", _engine_prefill, 1.1, 0.9),
    _row("engine-prefill-prefix", "the same with an empty prefix cache to without one", _kept_prefill),
    _row("engine-prefill-beside", "8k tokens until the first one, beside a request that decodes", _beside, unit="ms"),
    _row("first-token-cold", "until the first replayed step, nothing compiled before", _first_token("cold"), 90.0, 45.0,
         unit="s"),
    _row("first-token-warm", "until the first replayed step, everything compiled before", _first_token("warm"), 15.0,
         8.0, unit="s"),
    _row("waits", "waits for the device per step", _waits, 1.0, unit="waits"),
    *(
        _row(f"drafts-auto-{c}", f"--drafts auto to our causal graph, 1 and 1.5 tokens per step, C = {c}",
             _chosen(c, LOW), 0.98, at_least=True)
        for c in AUTO
    ),
    *(
        _row(f"drafts-auto-gain-{c}", f"the same at 2.65 and 3.5, C = {c}", _chosen(c, HIGH), 0.98, at_least=True)
        for c in AUTO
    ),
    _row("causal-step-8", "causal step to stock graph, C = 8", _causal(8)),
    _row("causal-step-32", "causal step to stock graph, C = 32", _causal(32)),
    _row("diffusion-trust-step-1", "Diffusion-Trust step, C = 1", _alone("diffusion-trust", 1), unit="ms"),
    _row("causal-step-1-eager", "causal step without a graph, C = 1", _alone("causal", 1, "off"), unit="ms"),
    _row("ar-trust-step-1-eager", "AR-Trust step without a graph, C = 1", _alone("ar-trust", 1, "off"), unit="ms"),
    _row("stock-generate-1", "transformers generate, per token, C = 1", _generate(1), unit="ms"),
)


def select(only: Sequence[str]) -> list[Case]:
    """The rows whose names begin with one of `only`, in that order, or all. Raises `UsageError` for a name of no row.
    """
    return named(ROWS, only, "flarec bench decode --list shows them") if only else list(ROWS)
