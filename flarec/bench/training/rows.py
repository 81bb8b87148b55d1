"""The rows of `flarec bench train`, with what is required of them (ratios within one run).

First each part is run, those that others are compared with before the rest; the ratios come at the end and take no
time. Of a part's micro batches the fastest counts, of `flare` the fastest that stays below the bar on memory, if one
does. MFU counts the head only for rows that need logits, no attention, and nothing that is computed again.
"""

from __future__ import annotations

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


def best(session: TrainingSession, part: str) -> dict[str, Any]:
    return chosen(session.part(part), MOST.get(part))


def values_of(one: dict[str, Any]) -> dict[str, float | None]:
    """What a table shows of a try."""
    names = ("micro_rows", "seconds", "spread", "first_step_seconds", "peak_gib", "predicted_gib", "loss")
    shares = {f"share of {kind}": share for kind, share in one.get("shares", {}).items()}
    return {**{name: one[name] for name in names if one.get(name) is not None}, **shares}


def _step(part: str) -> Measure:
    def measure(session: TrainingSession) -> Measured:
        one, notes = best(session, part), []
        result = session.results[part]
        if "library" in result:
            notes.append(f"{PACKAGE} {result['library']}" if result["library"] else f"without {PACKAGE}")
        if "error" in result:
            notes.append(result["error"])
        return Measured(1e6 * one["seconds"] / session.tokens, values_of(one), tuple(notes))

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


def _to_stock(part: str) -> Measure:
    def measure(session: TrainingSession) -> Measured:
        theirs, found = stock_seconds(session)
        one = best(session, part)
        return Measured(one["seconds"] / theirs, {"seconds": one["seconds"], "micro_rows": one["micro_rows"], **found})

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
        one = best(session, part)
        tried = {f"GiB of {other['micro_rows']} rows": other["peak_gib"] for other in fitting(session.part(part))}
        return Measured(peak_of(one), {"micro_rows": one["micro_rows"], **tried})

    return measure


def _mfu(part: str) -> Measure:
    def measure(session: TrainingSession) -> Measured:
        result, one = session.part(part), best(session, part)
        body = result["parameters"] - result["head"]
        work = 6 * (body * one["processed"] + result["head"] * one["head_rows"])
        rate = 1e12 * session.ceilings()["matmul_tflop_per_s"]
        return Measured(work / one["seconds"] / rate, {"seconds": one["seconds"], "TFLOP": work / 1e12})

    return measure


def _idle(part: str) -> Measure:
    def measure(session: TrainingSession) -> Measured:
        one = best(session, part)
        if not one["shares"]:
            raise NotMeasured("kernels are seen on CUDA devices")
        return Measured(one["shares"]["idle"], {k: v for k, v in values_of(one).items() if k.startswith("share")})

    return measure


def _first(session: TrainingSession) -> Measured:
    return Measured(session.part("first-step")["tries"][0]["seconds"])


def _doctor(key: str) -> Measure:
    """How far the doctor's prediction is from what was measured with as many rows, as a factor of 1 or more."""

    def measure(session: TrainingSession) -> Measured:
        predicted = {one["micro_rows"]: one for one in fitting(session.part("doctor"))}
        found = {one["micro_rows"]: one for one in fitting(session.part("flare"))}
        rows = max(predicted.keys() & found.keys(), default=0)
        if not rows:
            raise NotMeasured("no micro batch was predicted and measured")
        if found[rows][key] is None:
            raise NotMeasured("memory is told by CUDA devices")
        ratio = predicted[rows][key] / found[rows][key]
        values: dict[str, float | None] = {"predicted": predicted[rows][key], "measured": found[rows][key]}
        return Measured(max(ratio, 1 / ratio), {**values, "micro_rows": float(rows)})

    return measure


def _row(name: str, title: str, measure: Measure, bar: float | None = None, aim: float | None = None,
         *, unit: str = "x", at_least: bool = False) -> Case:
    def of_session(session: Session) -> Measured:
        assert isinstance(session, TrainingSession)
        return measure(session)

    return Case(name, title, of_session, lambda session: None, unit, bar, aim, at_least)


def _steps(*parts: str) -> list[Case]:
    return [_row(f"{part}-step", f"{part}: time per clean token", _step(part), unit="us") for part in parts]


ROWS: tuple[Case, ...] = (
    *_steps("stock", "ar", "flare", "draft", "adapter"),
    _row("first-step", "flare: first step, nothing compiled before", _first, 40.0, 20.0, unit="s"),
    _row("doctor-time", "doctor's time of a step of flare to what was measured", _doctor("seconds"), 1.15),
    _row("doctor-peak", "doctor's peak of a step of flare to what was measured", _doctor("peak_gib"), 1.15),
    _row("flare-4B-peak", "full fine-tuning of the 4B shape, layers computed again", _peak("flare-4B"), CARD_141,
         unit="GiB"),
    *_steps("flare-recompute", "stock-compiled"),
    _row("ar-to-stock", "AR-SFT of our machinery to the best stock, per clean token", _to_stock("ar"), 0.8, 0.65),
    _row("flare-to-stock", "flare to the best stock AR-SFT, per clean token", _to_stock("flare"), 2.2, 1.7),
    _row("draft-to-stock", "draft to the best stock AR-SFT, per clean token", _to_stock("draft"), 1.6, 1.2),
    _row("adapter-to-ar", "adapter to our AR-SFT, per clean token", _to_ar("adapter", "ar"), 1.6, 1.2),
    _row("adapter-memory", "adapter to our AR-SFT, peak memory", _memory_to_ar("adapter", "ar"), 0.4, 0.3),
    _row("flare-mfu", "flare: exact MFU", _mfu("flare"), 0.45, 0.55, at_least=True),
    _row("flare-peak", "flare: peak memory", _peak("flare"), 55.0, 45.0, unit="GiB"),
    _row("flare-recompute-peak", "flare, layers computed again: peak memory", _peak("flare-recompute"), 55.0, 45.0,
         unit="GiB"),
    _row("flare-idle", "flare: share of the time in which the GPU is idle", _idle("flare"), 0.04, 0.02),
)
EXTRA: tuple[Case, ...] = (
    *_steps("ar-recompute", "adapter-recompute", "adapter-9B"),
    _row("adapter-recompute-to-ar", "adapter to our AR-SFT, layers of both computed again",
         _to_ar("adapter-recompute", "ar-recompute"), 1.6, 1.2),
    _row("adapter-recompute-memory", "the same, peak memory", _memory_to_ar("adapter-recompute", "ar-recompute"), 0.4,
         0.3),
    _row("adapter-recompute-peak", "adapter, layers computed again: peak memory", _peak("adapter-recompute"), CARD_24,
         unit="GiB"),
    _row("adapter-9B-peak", "adapter of the 9B shape, layers computed again", _peak("adapter-9B"), CARD_80,
         unit="GiB"),
)
"""Only where they are named."""


def select(only: Sequence[str]) -> list[Case]:
    """The rows whose names begin with one of `only`, in that order, or `ROWS`. Raises `UsageError` for a name of no
    row."""
    return named((*ROWS, *EXTRA), only, "flarec bench train --list shows them") if only else list(ROWS)


def parts_of(rows: Sequence[Case]) -> list[str]:
    """What is compiled ahead for them: the parts that their names begin with, and what these are compared with."""
    names = [row.name for row in rows]
    found = [part for part in ("stock", "ar", "flare", "draft", "adapter") if any(_is_of(n, part) for n in names)]
    if any(name.endswith("-to-stock") for name in names):
        found.insert(0, "stock")
    if any("-4B" in name for name in names):
        found.append("flare-4B")
    if any("-9B" in name for name in names):
        found.append("adapter-9B")
    return list(dict.fromkeys(found))


def _is_of(name: str, part: str) -> bool:
    return name.startswith(f"{part}-") and "-4B" not in name and "-9B" not in name
