"""The table: what is measured, in order of importance, and what is required of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import UsageError
from . import conv, decode, flex, linear, softmax
from .measure import GIB, NotMeasured, TrainingTime
from .problems import Conv, DecodeStep, Linear, Softmax, StreamSizes
from .session import Case, Measured, Session

LAYER = Linear()
ONE_VIEW = replace(LAYER, streams=replace(LAYER.streams, views=1))
KDA = replace(LAYER, heads=32, gate="channel")
MAMBA = replace(LAYER, heads=64, value_dim=64, delta=False)
LONG = replace(LAYER, streams=StreamSizes(rows=1, tokens=131072))
PACKED = replace(LAYER, streams=StreamSizes(documents=10, prompt=0.25))
CONV = Conv()
ATTENTION = Softmax()
WIDE_ATTENTION = Softmax(heads=8, key_heads=2, dim=256)
STEP = DecodeStep()
BLOCKS = (1, 2, 3, 8, 16, 32)
PLOTTED = (1, 2, 4, 8, 16, 32)
ROUTE_BLOCKS = {"simple": (4, 8, 16, 32), "virtual queries": (1, 2, 4, 8, 16, 32)}


def with_block(problem: Linear, block: int) -> Linear:
    return replace(problem, streams=replace(problem.streams, block=block))


def _gib(training: TrainingTime) -> float:
    if training.peak_bytes is None:
        raise NotMeasured("peak memory is measured on CUDA devices only")
    return training.peak_bytes / GIB


def _rates(session: Session, problem: Linear, milliseconds: float, backward: bool) -> dict[str, float | None]:
    """GB/s and TFLOP/s of the bytes and the arithmetic that are needed at least, and their share of the ceilings."""
    problem = session.size(problem)
    parts, limits = 2 if backward else 1, session.ceilings()
    moved = sum(linear.least_bytes(problem)[:parts]) / milliseconds / 1e6
    flops = sum(linear.dense_flops(problem)[:parts]) / milliseconds / 1e9
    return {
        "gb_per_s": moved,
        "of_copy": moved / limits["copy_gb_per_s"],
        "tflop_per_s": flops,
        "of_matmul": flops / limits["matmul_tflop_per_s"],
    }


def _against_clean(problem: Linear, forward_only: bool = False) -> Callable[[Session], Measured]:
    def measure(session: Session) -> Measured:
        ours, clean = linear.ours(session, problem), linear.clean_baseline(session, problem)
        mine, theirs = (x.forward_ms if forward_only else x.both_ms for x in (ours, clean))
        values = {"ours_ms": mine, "baseline_ms": theirs, **_rates(session, problem, mine, not forward_only)}
        return Measured(mine / theirs, values)

    return measure


def _memory(session: Session) -> Measured:
    ours = _gib(linear.ours(session, LAYER))
    return Measured(ours, {"ours_gib": ours})


def _block_size(block: int) -> Callable[[Session], Measured]:
    def measure(session: Session) -> Measured:
        mine, four = (linear.ours(session, with_block(LAYER, size)).both_ms for size in (block, 4))
        return Measured(mine / four, {"ours_ms": mine, "block_4_ms": four})

    return measure


def _simple_time(session: Session) -> Measured:
    ours, simple = linear.ours(session, ONE_VIEW), linear.route(session, ONE_VIEW, "simple")
    return Measured(simple.both_ms / ours.both_ms, {"ours_ms": ours.both_ms, "route_ms": simple.both_ms})


def _simple_memory(session: Session) -> Measured:
    ours, simple = (_gib(x) for x in (linear.ours(session, ONE_VIEW), linear.route(session, ONE_VIEW, "simple")))
    return Measured(simple / ours, {"ours_gib": ours, "route_gib": simple})


def _conv(session: Session) -> Measured:
    ours, clean = conv.ours(session, CONV), conv.clean_baseline(session, CONV)
    rate = conv.least_bytes(session.size(CONV)) / ours.both_ms / 1e6
    return Measured(
        ours.both_ms / clean.both_ms,
        {"ours_ms": ours.both_ms, "ours_forward_ms": ours.forward_ms, "baseline_ms": clean.both_ms,
         "baseline_forward_ms": clean.forward_ms, "gb_per_s": rate},
    )


def _per_token(session: Session) -> Measured:
    long, rows = linear.ours(session, LONG), linear.ours(session, LAYER)
    tokens = [session.size(problem).streams.clean_tokens for problem in (LONG, LAYER)]
    per_token = [1e6 * x.both_ms / n for x, n in zip((long, rows), tokens, strict=True)]
    return Measured(per_token[0] / per_token[1], {"long_ns_per_token": per_token[0], "rows_ns_per_token": per_token[1]})


def _packed(session: Session) -> Measured:
    packed, plain = (linear.ours(session, problem).both_ms for problem in (PACKED, LAYER))
    return Measured(packed / plain, {"packed_ms": packed, "one_document_ms": plain})


def _decode(session: Session) -> Measured:
    ours, one_row = decode.ours(session, STEP), decode.recurrent_baseline(session, STEP)
    rate = decode.least_bytes(session.size(STEP)) / ours / 1e6
    return Measured(ours / one_row, {"ours_us": 1e3 * ours, "baseline_us": 1e3 * one_row, "gb_per_s": rate})


def _attention(problem: Softmax, name: str = "ours") -> Callable[[Session], Measured]:
    """Ours, or "flex" in its place, to causal attention per visible pair."""

    def measure(session: Session) -> Measured:
        timed = (flex.flex if name == "flex" else softmax.ours)(session, problem)
        plain, pairs = softmax.causal(session, problem), softmax.pairs_ratio(session, problem)
        return Measured(
            timed.both_ms / (plain.both_ms * pairs),
            {f"{name}_ms": timed.both_ms, "causal_ms": plain.both_ms, "pairs_ratio": pairs,
             "forward_ratio": timed.forward_ms / (plain.forward_ms * pairs)},
        )

    return measure


def _plain_tokens(session: Session) -> Measured:
    """The same number of tokens, all clean, through the baseline's kernel: what the arithmetic costs there."""
    tripled = replace(LAYER, streams=replace(LAYER.streams, tokens=3 * LAYER.streams.tokens))
    ours, plain = linear.ours(session, LAYER), linear.clean_baseline(session, tripled)
    return Measured(plain.both_ms / ours.both_ms, {"ours_ms": ours.both_ms, "baseline_ms": plain.both_ms})


def _one_view(block: int) -> Callable[[Session], Measured]:
    def measure(session: Session) -> Measured:
        ours = linear.ours(session, with_block(ONE_VIEW, block))
        return Measured(ours.both_ms, {"forward_ms": ours.forward_ms, "gib": _or_none(ours)})

    return measure


def _route(name: str, block: int) -> Callable[[Session], Measured]:
    def measure(session: Session) -> Measured:
        found = linear.route(session, with_block(ONE_VIEW, block), name)
        return Measured(found.both_ms, {"forward_ms": found.forward_ms, "gib": _or_none(found)})

    return measure


def _or_none(training: TrainingTime) -> float | None:
    return None if training.peak_bytes is None else training.peak_bytes / GIB


def _checks(*problems: Linear | Conv | Softmax | DecodeStep) -> Callable[[Session], None]:
    def check(session: Session) -> None:
        for problem in problems:
            if isinstance(problem, Linear):
                linear.check_ours(session, problem)
            elif isinstance(problem, Conv):
                conv.check_ours(session, problem)
            elif isinstance(problem, Softmax):
                softmax.check_ours(session, problem)
            else:
                decode.check_ours(session, problem)

    return check


def _slug(name: str) -> str:
    return name.replace(" ", "-")


RULE = ("gated_delta_rule",)
BARS: tuple[Case, ...] = (
    Case("linear-train", "linear attention, forward + backward, to the clean stream alone", _against_clean(LAYER),
        _checks(LAYER), bar=2.3, aim=1.3, baselines=RULE),
    Case("linear-forward", "linear attention, forward, to the clean stream alone", _against_clean(LAYER, True),
        _checks(LAYER), bar=2.2, aim=1.3, baselines=RULE),
    Case("linear-memory", "linear attention, peak extra memory of forward + backward", _memory, _checks(LAYER),
        unit="GiB", bar=2.5, aim=1.5),
    *(
        Case(f"linear-block-{block}", f"linear attention, blocks of {block} to blocks of 4", _block_size(block),
            _checks(with_block(LAYER, block), LAYER), bar=1.3, aim=1.1)
        for block in BLOCKS
    ),
    Case("conv-train", "short convolution, three streams to the clean stream alone", _conv, _checks(CONV), bar=1.5,
        aim=0.9, baselines=("short_conv",)),
    Case("decode-step", "linear attention, decode step to a recurrent step of one row", _decode, _checks(STEP), bar=2.5,
        aim=1.5, baselines=("recurrent_step",)),
    Case("softmax-128", "softmax attention, D = 128, to causal attention per visible pair", _attention(ATTENTION),
        _checks(ATTENTION), bar=1.3),
    Case("softmax-256", "softmax attention, D = 256, to causal attention per visible pair", _attention(WIDE_ATTENTION),
        _checks(WIDE_ATTENTION), bar=1.3),
    Case("linear-long", "linear attention, one row of 131072 tokens to 8 x 4096, per token", _per_token,
        _checks(LONG, LAYER), bar=1.3),
    Case("linear-packed", "linear attention, ten documents and 25 % prompt to one document without", _packed,
        _checks(PACKED, LAYER), bar=1.1, aim=1.0),
    Case("linear-simple-time", "the simple route's time to ours, one view", _simple_time, _checks(ONE_VIEW), bar=15,
        at_least=True, baselines=RULE),
    Case("linear-simple-memory", "the simple route's memory to ours, one view", _simple_memory, _checks(ONE_VIEW),
        bar=10, at_least=True, baselines=RULE),
)
REPORTED: tuple[Case, ...] = (
    Case("linear-kda", "channel gates (KDA, 32 heads) to the clean stream alone", _against_clean(KDA), _checks(KDA),
        baselines=("kda",)),
    Case("linear-mamba2", "no delta (Mamba-2, 64 heads, V = 64) to the clean stream alone", _against_clean(MAMBA),
        _checks(MAMBA), baselines=("simple_gla",)),
    Case("linear-plain", "all tokens as one clean stream through the baseline, to ours", _plain_tokens, _checks(LAYER),
        baselines=RULE),
    *(
        Case(f"one-view-block-{block}", f"ours, one view, blocks of {block}", _one_view(block),
            _checks(with_block(ONE_VIEW, block)), unit="ms")
        for block in PLOTTED
    ),
    *(
        Case(f"{_slug(name)}-block-{block}", f"route with {name if name != 'simple' else 'stored states'}, one view, "
            f"blocks of {block}", _route(name, block), _checks(), unit="ms", baselines=RULE)
        for name, blocks in ROUTE_BLOCKS.items() for block in blocks
    ),
    Case("softmax-flex-128", "flex attention, D = 128, to causal attention per visible pair",
        _attention(ATTENTION, "flex"), _checks()),
)
ROWS = (*BARS, *REPORTED)


def select(only: Sequence[str] = (), *, quick: bool = False) -> list[Case]:
    """Rows by name, or by the beginning of names ("linear-block"); `quick`: those with a bar. Raises `UsageError`."""
    known = [row.name for row in ROWS]
    for name in only:
        if not any(row == name or row.startswith(f"{name}-") for row in known):
            raise UsageError(f"unknown row '{name}'; choose among {', '.join(known)}")
    rows = BARS if quick and not only else ROWS
    return [row for row in rows if not only or any(row.name == n or row.name.startswith(f"{n}-") for n in only)]
