"""What `flarec tune` measured, as the manifest holds it: accuracy at tokens per forward over settings, for each mode.

    metrics.tuning = {MODE: {"data": {"name", "sha256"}, "temperature", "max_new_tokens", "keep",
                             "causal": {HALF: numbers}, "curve": [numbers of a setting],
                             "chosen": {"threshold", "recheck"}, "reported": numbers}}

Nothing is decided by it (the settings that hold are in `decode.chosen`): a value that is no number counts as unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .manifest import Manifest

KEY = "tuning"
HEAD = ("half", "threshold", "recheck", "accuracy", "95 %", "tokens per forward", "answers")
CAUSAL = "causal"
LARGEST = 1e15
"""Of a number that is shown."""


@dataclass(frozen=True)
class Point:
    """A row of the table. half: "choosing" or "reporting", of the prompts; causal: of causal decoding, which has no
    setting. Numbers are None where they are unknown."""

    half: str
    threshold: float | None
    recheck: float | None
    accuracy: float | None
    interval: tuple[float, float] | None
    tokens_per_forward: float | None
    answers: float | None
    causal: bool = False

    def cells(self) -> tuple[str, ...]:
        """As `HEAD` names them."""
        span = "-" if self.interval is None else "{:.1%} to {:.1%}".format(*self.interval)
        setting = (CAUSAL, "") if self.causal else (_text(self.threshold, "g"), _text(self.recheck, "g"))
        return (
            self.half, *setting, _text(self.accuracy, ".1%"), span, _text(self.tokens_per_forward, ".2f"),
            _text(self.answers, ",.0f"),
        )


@dataclass(frozen=True)
class Curve:
    """Of one mode. about: what it was measured on, and what was chosen."""

    mode: str
    about: str
    points: tuple[Point, ...]


def curves(manifest: Manifest) -> list[Curve]:
    """Those of a manifest, in the order of the modes' names; often none."""
    tables = manifest.metrics.get(KEY)
    if not isinstance(tables, Mapping):
        return []
    found = [Curve(mode, _about(table), tuple(_points(table))) for mode, table in sorted(tables.items())
             if isinstance(table, Mapping)]
    return [curve for curve in found if curve.points]


def without_settings(manifest: Manifest, mode: str) -> Manifest:
    """A manifest without what was chosen and measured for a mode."""
    tables = _mapping(manifest.metrics.get(KEY))
    rest = {name: table for name, table in tables.items() if name != mode}
    metrics = {name: value for name, value in manifest.metrics.items() if name != KEY} | ({KEY: rest} if rest else {})
    chosen = {name: pair for name, pair in manifest.decode.chosen.items() if name != mode}
    return replace(manifest, decode=replace(manifest.decode, chosen=chosen), metrics=metrics)


def _points(table: Mapping[str, Any]) -> Iterable[Point]:
    causal = table.get("causal")
    for half in ("choosing", "reporting"):
        if isinstance(causal, Mapping) and isinstance(causal.get(half), Mapping):
            yield _point(half, causal[half], {}, causal=True)
        rows = table.get("curve") if half == "choosing" else [table.get("reported")]
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, Mapping):
                yield _point(half, row, row if half == "choosing" else _mapping(table.get("chosen")))


def _point(half: str, row: Mapping[str, Any], setting: Mapping[str, Any], *, causal: bool = False) -> Point:
    ends = row.get("accuracy_interval")
    low, high = (_number(end) for end in ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return Point(
        half, _number(setting.get("threshold")), _number(setting.get("recheck")), _number(row.get("accuracy")),
        None if low is None or high is None else (low, high), _number(row.get("tokens_per_forward")),
        _number(row.get("answers")), causal,
    )


def _about(table: Mapping[str, Any]) -> str:
    data, chosen, keep = _mapping(table.get("data")), _mapping(table.get("chosen")), _number(table.get("keep"))
    threshold, recheck = (_text(_number(chosen.get(name)), "g") for name in ("threshold", "recheck"))
    heat, new = _text(_number(table.get("temperature")), "g"), _text(_number(table.get("max_new_tokens")), ",.0f")
    name, digest = " ".join(str(data.get("name")).split()), str(data.get("sha256"))[:16]
    return (
        f"On {name} (sha256 {digest}), temperature {heat}, at most {new} new tokens. A threshold of {threshold} with a "
        f"recheck of {recheck} has most tokens per forward among the settings that keep {_text(keep, '.0%')} of causal "
        "decoding's accuracy on one half of the tasks (choosing); the other half (reporting) chose nothing."
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if known and math.isfinite(value) and abs(value) <= LARGEST else None


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
