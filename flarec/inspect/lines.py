"""A graph as lines, and the lines that each pass took out and put in, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from torch import fx

from flarec import ops
from flarec.ir.program import Program, layer_of, target_name

Lines = dict[int | None, list[str]]
"""The lines of every decoder layer; None: of what is outside of the layers."""
Change = tuple[str, str]
"""("-" or "+", line)."""


def node_line(node: fx.Node) -> str:
    """`%name = target(operands)`; a semantic op's operands with their names."""
    if node.op == "placeholder":
        return f"%{node.name} = input"
    if node.op == "output":
        return f"return {_operand(node.args[0])}"
    if node.op == "get_attr":
        return f"%{node.name} = {node.target}"
    keywords = node.kwargs if ops.mixer_of(node.target) else {k: v for k, v in node.kwargs.items() if v is not None}
    named = (f"{name}={_operand(value)}" for name, value in keywords.items())
    return f"%{node.name} = {target_name(node)}({', '.join([*map(_operand, node.args), *named])})"


def _operand(value: object) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_operand(item) for item in value) + "]"
    return str(value)


def lines_of(program: Program) -> Lines:
    """Every node's line, by layer, in graph order. Parameters stand where they are read, not for themselves."""
    lines: Lines = {}
    for node in program.graph.nodes:
        if node.op != "get_attr":
            lines.setdefault(layer_of(node), []).append(node_line(node))
    return lines


class Recorder:
    """Keeps the lines before the first pass and after each: give it to `run_pipeline` as `on_pass`."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Lines]] = []

    def __call__(self, step: str, program: Program) -> None:
        self.steps.append((step, lines_of(program)))

    def changes(self, groups: Sequence[Sequence[int]]) -> Iterator[tuple[str, list[tuple[str, list[Change]]]]]:
        """(pass, [(place, lines that went and came)]) for every pass. Of layers that are alike (`groups`) the first one
        is shown, unless a pass does not change them alike: then each that differs."""
        for (_, before), (step, after) in zip(self.steps, self.steps[1:], strict=False):
            places: list[tuple[str, list[Change]]] = []
            outside = difference(before.get(None, []), after.get(None, []))
            if outside:
                places.append(("outside of the layers", outside))
            for group in groups:
                counts = {layer: _size(before.get(layer, []), after.get(layer, [])) for layer in group}
                for shown in sorted({min(k for k in group if counts[k] == size) for size in counts.values()}):
                    alike = [layer for layer in group if counts[layer] == counts[shown]]
                    lines = difference(before.get(shown, []), after.get(shown, []))
                    if lines:
                        more = f" (and {len(alike) - 1} more like it)" if len(alike) > 1 else ""
                        places.append((f"layer {shown}{more}", lines))
            yield step, places


def difference(before: Sequence[str], after: Sequence[str]) -> list[Change]:
    """The lines that are in one of two graphs only, in order."""
    changes: list[Change] = []
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    for kind, first, last, start, stop in matcher.get_opcodes():
        if kind != "equal":
            changes += [("-", line) for line in before[first:last]]
            changes += [("+", line) for line in after[start:stop]]
    return changes


def _size(before: Sequence[str], after: Sequence[str]) -> tuple[int, int]:
    """How many lines went and came: equal for layers that a pass treats alike."""
    gone, came = {*before} - {*after}, {*after} - {*before}
    return len(gone), len(came)
