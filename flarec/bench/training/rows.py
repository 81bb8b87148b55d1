"""The rows of `flarec bench train`, with what is required of them (ratios within one run).

First each part is run, those that others are compared with before the rest; the ratios come at the end and take no
time. Of a part's micro batches the fastest counts; of `flare`, with everything kept or layers computed again, the
fastest run that stays below the bar on memory, if one does: speed, memory, MFU and idle share are of this one run, and
the fastest of all is told beside it. MFU counts the head only for rows that need logits, no attention, and nothing that
is computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from ..baselines import PACKAGE
from ..measure import NotMeasured
from ..session import Case, Measured, Session, named
from .session import TrainingSession, chosen, fitting

GIB = 2**30
CARD_24, CARD_80, CARD_141 = 24e9 / GIB, 80e9 / GIB, 141e9 / GIB
MOST = {"flare": 55.0, "flare-recompute": 55.0, "adapter-recompute": CARD_24}
"""GiB below which a try of these parts is preferred."""
Measure = Callable[[TrainingSession], Measured]


RUNS = {"flare": ("flare", "flare-recompute")}
"""Parts that are ways to the same result: any of their tries may be the run that counts."""


def best(session: TrainingSession, part: str) -> dict[str, Any]:
    return chosen(session.part(part), MOST.get(part))


def runs(session: TrainingSession, part: str) -> dict[str, Any]:
    """The tries of a part and of those that are ways to the same result; each says of which it is. Raises
    `NotMeasured` where the part itself has none."""
    found = dict(session.part(part))
    for other in RUNS.get(part, ())[1:]:
        with contextlib.suppress(NotMeasured):
            more = [{**one, "part": other} for one in fitting(session.part(other))]
            found["tries"] = [*found["tries"], *more]
    return found


def counting(session: TrainingSession, part: str) -> dict[str, Any]:
    """The run that counts."""
    return chosen(runs(session, part), MOST.get(part))


def every_try(result: dict[str, Any]) -> dict[str, float | None]:
    """What each micro batch of a part took and needed, by name."""
    names = {"seconds": "seconds", "peak_gib": "GiB", "predicted_gib": "predicted GiB"}
    return {
        f"{name} of {rows_of(one)}": one[key]
        for one in fitting(result) for key, name in names.items() if one.get(key) is not None
    }


def rows_of(one: dict[str, Any]) -> str:
    """The rows of a try in words."""
    again = ", computed again" if str(one.get("part", "")).endswith("-recompute") else ""
    return f"{one['micro_rows']} rows{again}"


def why_this(session: TrainingSession, part: str) -> tuple[str, ...]:
    """Which of several runs counts, in a line, where it is not the fastest."""
    result = runs(session, part)
    one, fastest = chosen(result, MOST.get(part)), chosen(result)
    if one is fastest:
        return ()
    return (
        f"of {len(fitting(result))} runs the fastest within {MOST[part]:.0f} GiB: {rows_of(one)}, "
        f"{one['seconds']:.3f} s, {one['peak_gib']:.1f} GiB; the fastest of all: {rows_of(fastest)}, "
        f"{fastest['seconds']:.3f} s, {fastest['peak_gib']:.1f} GiB",
    )


def values_of(one: dict[str, Any]) -> dict[str, float | None]:
    """What a table shows of a try."""
    names = ("micro_rows", "seconds", "spread", "first_step_seconds", "peak_gib", "predicted_gib", "loss")
    shares = {f"share of {kind}": share for kind, share in one.get("shares", {}).items()}
    return {**{name: one[name] for name in names if one.get(name) is not None}, **shares}


def _step(part: str) -> Measure:
    def measure(session: TrainingSession) -> Measured:
        one, notes = best(session, part), list[str]()
        result = session.results[part]
        if "library" in result:
            notes.append(f"{PACKAGE} {result['library']}" if result["library"] else f"without {PACKAGE}")
        if "error" in result:
            notes.append(result["error"])
        values = {**values_of(one), **every_try(result)}
        return Measured(1e6 * one["seconds"] / session.tokens, values, tuple(notes))

    return measure


def stock_seconds(session: TrainingSession) -> tuple[float, dict[str, float | None]]:
    """Of the fastest stock step: eager, or compiled where that was run."""
    found: dict[str, float | None] = {}
    for part in ("stock", "stock-compiled"):
        if part == "stock" or part in session.results:
            try:
                found[f"{part} seconds"] = best(session, part)["seconds"]
            except NotMeasured:
                if part == "stock" and "stock-compiled" not in session.results:
                    raise
    if not found:
        raise NotMeasured(f"no stock step: {session.results['stock'].get('error', 'nothing fitted')}")
    return min(value for value in found.values() if value is not None), found


def _to_stock(part: str, *, fastest: bool = False) -> Measure:
    """fastest: of all micro batches, whatever memory it needs."""

    def measure(session: TrainingSession) -> Measured:
        theirs, found = stock_seconds(session)
        one = chosen(runs(session, part)) if fastest else counting(session, part)
        names = ("seconds", "micro_rows", "peak_gib")
        notes = () if fastest else why_this(session, part)
        return Measured(one["seconds"] / theirs, {**{name: one[name] for name in names}, **found}, notes)

    return measure


def _to_ar(part: str, other: str) -> Measure:
    def measure(session: TrainingSession) -> Measured:
        ours, theirs = best(session, part), best(session, other)
        values = {"seconds": ours["seconds"], f"{other} seconds": theirs["seconds"]}
        return Measured(ours["seconds"] / theirs["seconds"], values)

    return measure


def _memory_to_ar(part: str, other: str) -> Measure:
    def measure(session: TrainingSession) -> Measured:
        ours, theirs = (
            {one["micro_rows"]: peak_of(one) for one in fitting(session.part(name))} for name in (part, other)
        )
        rows = max(ours.keys() & theirs.keys(), default=0)
        if not rows:
            raise NotMeasured("no micro batch was measured of both")
        return Measured(ours[rows] / theirs[rows], {"GiB": ours[rows], f"{other} GiB": theirs[rows],
                                                    "micro_rows": float(rows)})

    return measure


def peak_of(one: dict[str, Any]) -> float:
    if one["peak_gib"] is None:
        raise NotMeasured("memory is told by CUDA devices")
    return float(one["peak_gib"])


def _peak(part: str) -> Measure:
    def measure(session: TrainingSession) -> Measured:
        one = counting(session, part)
        values = {"micro_rows": one["micro_rows"], **every_try(runs(session, part))}
        return Measured(peak_of(one), values, why_this(session, part))

    return measure


def _mfu(part: str) -> Measure:
    def measure(session: TrainingSession) -> Measured:
        result, one = session.part(part), counting(session, part)
        body = result["parameters"] - result["head"]
        work = 6 * (body * one["processed"] + result["head"] * one["head_rows"])
        rate = 1e12 * session.ceilings()["matmul_tflop_per_s"]
        return Measured(work / one["seconds"] / rate, {"seconds": one["seconds"], "TFLOP": work / 1e12})

    return measure


def _idle(part: str) -> Measure:
    def measure(session: TrainingSession) -> Measured:
        one = counting(session, part)
        if not one["shares"]:
            raise NotMeasured("kernels are seen on CUDA devices")
        return Measured(one["shares"]["idle"], {k: v for k, v in values_of(one).items() if k.startswith("share")})

    return measure


def _first(session: TrainingSession) -> Measured:
    beside = ("an upper bound: beside processes that compile for other parts",) if session.is_warm else ()
    return _launch(session.part("first-step"), *beside)


def _launch(result: dict[str, Any], *notes: str) -> Measured:
    one = result["tries"][0]
    values = {name: one.get(name) for name in ("micro_rows", "first_step_seconds")}
    notes = ("imports, the model and its capture are in it", *notes)
    return Measured(one["first_step_at"] - result["launched"], values, notes)


def _first_warm(session: TrainingSession) -> Measured:
    if not session.is_warm:
        raise NotMeasured("nothing was compiled ahead")
    return _launch(session.part("flare"))


def _doctor(key: str) -> Measure:
    """How far the doctor's prediction is from what was measured with as many rows as count, as a factor of 1 or
    more."""

    def measure(session: TrainingSession) -> Measured:
        predicted = {one["micro_rows"]: one for one in fitting(session.prediction())}
        found = {one["micro_rows"]: one for one in fitting(session.part("flare"))}
        rows = [number for number in found if number in predicted]
        if not rows:
            raise NotMeasured("no micro batch was predicted and measured")
        if any(found[number][key] is None for number in rows):
            raise NotMeasured("memory is told by CUDA devices")
        told = {number: session.seconds_of(predicted[number]) if key == "seconds" else predicted[number][key]
                for number in rows}
        ratios = {number: max(told[number] / found[number][key], found[number][key] / told[number]) for number in rows}
        values: dict[str, float | None] = {}
        for number in rows:
            values |= {f"predicted of {number} rows": told[number], f"measured of {number} rows": found[number][key]}
        counts = best(session, "flare")["micro_rows"]
        number = counts if counts in rows else rows[0]
        return Measured(ratios[number], {**values, "micro_rows": float(number)})

    return measure


NEEDS: dict[str, tuple[str, ...]] = {}
"""By row the parts that it is made of."""


def _row(name: str, title: str, measure: Measure, parts: str, bar: float | None = None, aim: float | None = None,
         *, unit: str = "x", at_least: bool = False) -> Case:
    NEEDS[name] = tuple(parts.split())

    def of_session(session: Session) -> Measured:
        assert isinstance(session, TrainingSession)
        return measure(session)

    return Case(name, title, of_session, lambda session: None, unit, bar, aim, at_least)


def _steps(*parts: str) -> list[Case]:
    return [_row(f"{part}-step", f"{part}: time per clean token", _step(part), part, unit="us") for part in parts]


ROWS: tuple[Case, ...] = (
    *_steps("stock", "ar", "draft", "adapter"),
    _row("flare-4B-peak", "full fine-tuning of the 4B shape, layers computed again", _peak("flare-4B"), "flare-4B",
         CARD_141, unit="GiB"),
    *_steps("flare", "ar-recompute", "adapter-recompute", "flare-recompute"),
    _row("first-step-cold", "flare: launch to first step, nothing compiled before", _first, "first-step", 180.0,
         unit="s"),
    _row("first-step-warm", "flare: launch to first step, compiled before", _first_warm, "flare", 40.0, 20.0, unit="s"),
    *_steps("stock-compiled"),
    _row("doctor-time", "doctor's time of a step of flare to what was measured", _doctor("seconds"), "flare doctor",
         1.15),
    _row("doctor-peak", "doctor's peak of a step of flare to what was measured", _doctor("peak_gib"), "flare doctor",
         1.15),
    _row("ar-to-stock", "AR-SFT of our machinery to the best stock, per clean token", _to_stock("ar"), "stock ar", 0.8,
         0.65),
    _row("flare-to-stock", "flare to the best stock AR-SFT, per clean token", _to_stock("flare"),
         "stock flare flare-recompute", 2.2, 1.7),
    _row("flare-fastest-to-stock", "the same with the fastest run, whatever memory it needs",
         _to_stock("flare", fastest=True), "stock flare", 2.2, 1.7),
    _row("draft-to-stock", "draft to the best stock AR-SFT, per clean token", _to_stock("draft"), "stock draft", 1.6,
         1.2),
    _row("adapter-to-ar", "adapter to our AR-SFT, per clean token", _to_ar("adapter", "ar"), "ar adapter", 1.6, 1.2),
    _row("adapter-memory", "adapter to our AR-SFT, peak memory, all kept", _memory_to_ar("adapter", "ar"),
         "ar adapter"),
    _row("adapter-recompute-to-ar", "adapter to our AR-SFT, layers of both computed again",
         _to_ar("adapter-recompute", "ar-recompute"), "ar-recompute adapter-recompute", 1.6, 1.2),
    _row("adapter-recompute-memory", "the same, peak memory", _memory_to_ar("adapter-recompute", "ar-recompute"),
         "ar-recompute adapter-recompute", 0.4, 0.3),
    _row("flare-mfu", "flare: exact MFU", _mfu("flare"), "flare flare-recompute", 0.45, 0.55, at_least=True),
    _row("flare-peak", "flare: peak memory", _peak("flare"), "flare flare-recompute", 55.0, 45.0, unit="GiB"),
    _row("flare-recompute-peak", "flare, layers computed again: peak memory", _peak("flare-recompute"),
         "flare-recompute", 55.0, 45.0, unit="GiB"),
    _row("flare-idle", "flare: share of the time in which the GPU is idle", _idle("flare"),
         "flare flare-recompute", 0.04, 0.02),
)
EXTRA: tuple[Case, ...] = (
    *_steps("adapter-9B"),
    _row("adapter-recompute-peak", "adapter, layers computed again: peak memory", _peak("adapter-recompute"),
         "adapter-recompute", CARD_24, unit="GiB"),
    _row("adapter-9B-peak", "adapter of the 9B shape, layers computed again", _peak("adapter-9B"), "adapter-9B",
         CARD_80, unit="GiB"),
)
"""Only where they are named."""


def select(only: Sequence[str]) -> list[Case]:
    """The rows whose names begin with one of `only`, in that order, or `ROWS`. Raises `UsageError` for a name of no
    row."""
    return named((*ROWS, *EXTRA), only, "flarec bench train --list shows them") if only else list(ROWS)


def parts_of(rows: Sequence[Case]) -> list[str]:
    """The parts that they are made of, in the order of the rows, each behind what it shares a process with."""
    return list(dict.fromkeys(part for row in rows for part in NEEDS[row.name]))
