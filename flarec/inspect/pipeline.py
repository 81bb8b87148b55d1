"""A pipeline drawn as a grid: a row per pass, a column per property, from where it is provided to where it is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flarec.ir.pipeline import Pass, names_of
from flarec.passes import GIVEN, PASSES

from .canvas import Canvas

PROVIDES, REQUIRES, BOTH, LOSES, HOLDS, NOTHING = "+", "o", "*", "x", "|", " "
LEGEND = {PROVIDES: "provides", REQUIRES: "requires", LOSES: "invalidates", HOLDS: "holds"}
_ROW, _COLUMN, _LEFT = 30.0, 26.0, 320.0
_FILLS = {PROVIDES: "#2f855a", REQUIRES: "#2b6cb0", BOTH: "#2f855a", LOSES: "#c53030"}


def pipeline_table(steps: Sequence[Pass]) -> list[dict[str, Any]]:
    """One plain table per pass, in order."""
    return [
        {
            "pass": step.text(),
            "requires": sorted(names_of(step.requires)),
            "provides": sorted(names_of(step.provides)),
            "invalidates": sorted(names_of(step.invalidates)),
            "built_in": step.name in PASSES,
        }
        for step in steps
    ]


def grid(steps: Sequence[Pass]) -> tuple[list[str], list[list[str]]]:
    """(property names in the order in which they are provided, one mark per pass and property)."""
    columns = sorted(GIVEN)
    for step in steps:
        columns += sorted((names_of(step.provides) | names_of(step.requires)) - {*columns})
    have, rows = set(GIVEN), []
    for step in steps:
        requires, provides, loses = map(names_of, (step.requires, step.provides, step.invalidates))
        marks = []
        for name in columns:
            if name in provides:
                mark = BOTH if name in requires else PROVIDES
            elif name in loses:
                mark = LOSES
            elif name in requires:
                mark = REQUIRES
            else:
                mark = HOLDS if name in have else NOTHING
            marks.append(mark)
        have = have - loses | provides
        rows.append(marks)
    return columns, rows


def pipeline_as_text(steps: Sequence[Pass], target: str) -> str:
    """The grid with the names of the properties above it, one per line."""
    columns, rows = grid(steps)
    width = max(len(step.text()) for step in steps) + 2
    lines = [f"pipeline '{target}', {len(steps)} passes"]
    for index, name in enumerate(columns):
        lines.append(" " * width + "| " * index + name)
    for step, marks in zip(steps, rows, strict=True):
        foreign = "" if step.name in PASSES else "  (plugin)"
        lines.append(f"{step.text():<{width}}{' '.join(marks)}{foreign}".rstrip())
    lines.append(", ".join(f"{mark} {what}" for mark, what in LEGEND.items()))
    return "\n".join(lines)


def pipeline_as_svg(steps: Sequence[Pass], target: str) -> str:
    """The grid as a drawing: a line runs from the pass that provides a property to the last one that finds it."""
    columns, rows = grid(steps)
    canvas, top = Canvas(), 40.0 + 16 * len(columns)
    canvas.text(24, 28, f"pipeline '{target}', {len(steps)} passes", size=15, bold=True)
    for index, name in enumerate(columns):
        x, y = _LEFT + _COLUMN * index, 52.0 + 16 * index
        canvas.text(x + 6, y, name, size=12)
        start = next((i for i, marks in enumerate(rows) if marks[index] in (PROVIDES, BOTH)), 0)
        canvas.line(x, y - 4, x, top + _ROW * start, "#cbd2d9", dash="2 3")
        last = max((i for i, marks in enumerate(rows) if marks[index] != NOTHING), default=start)
        canvas.line(x, top + _ROW * (0 if name in GIVEN else start), x, top + _ROW * last, "#7b8794", width=2)
    for row, (step, marks) in enumerate(zip(steps, rows, strict=True)):
        y = top + _ROW * row
        name = step.text() if step.name in PASSES else f"{step.text()}  (plugin)"
        canvas.text(24, y + 4, name, size=13, bold=step.name not in PASSES)
        for index, mark in enumerate(marks):
            if mark in _FILLS:
                x = _LEFT + _COLUMN * index
                what = f"{step.name} {'requires and provides' if mark == BOTH else LEGEND[mark]} {columns[index]}"
                canvas.rect(x - 6, y - 6, 12, 12, _FILLS[mark], radius=6, title=what)
    canvas.offset = (24.0, top + _ROW * len(rows) + 6)
    for index, (mark, what) in enumerate(item for item in LEGEND.items() if item[0] in _FILLS):
        canvas.rect(110.0 * index, 0, 12, 12, _FILLS[mark], radius=6)
        canvas.text(110.0 * index + 18, 11, what, size=12)
    return canvas.document()
