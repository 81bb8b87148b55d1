"""A summary as plain text: one screen for a model of 24 layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap

from flarec.ir.program import Program, module_of, source_line

from .lines import Recorder, node_line
from .shapes import shape_text
from .summary import Group, MixerSite, Part, Summary, layer_nodes

WIDTH = 118
LABEL = 11


def as_text(
    summary: Summary, program: Program | None = None, *, diff: Recorder | None = None, ops: bool = False
) -> str:
    """The program layer by layer. `diff` adds what passes changed, in counts and lines, `ops` (with `program`) the
    nodes of a layer."""
    lines = [*_header(summary), "", *_body(summary)]
    if ops:
        assert program is not None
        for group in summary.groups:
            lines += ["", f"nodes of layer {group.layers[0]}", *_nodes(program, group.layers[0])]
    if diff is not None:
        lines += ["", *_diff(summary, diff)]
    return "\n".join(lines)


def ranges(indices: Sequence[int]) -> str:
    """`0-2, 4-6, 9` for 0 1 2 4 5 6 9."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _field(label: str, text: str) -> list[str]:
    """`label      text`, wrapped with a hanging indent."""
    parts = wrap(text, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{label if i == 0 else '':<{LABEL}}{part}".rstrip() for i, part in enumerate(parts)]


def _header(summary: Summary) -> Iterator[str]:
    yield from _field(
        "program",
        f"{summary.model} ({summary.family}), {summary.layers} layers, {summary.parameters:,} parameters, "
        f"{summary.dtype}",
    )
    yield from _field("passes", " -> ".join(step.step.removesuffix("()") for step in summary.steps))
    yield from _field("properties", ", ".join(summary.properties))
    width = _column(14, [name for name, _ in (*summary.inputs, *summary.derived)])
    for index, (name, text) in enumerate(summary.inputs):
        yield from _field("inputs" if index == 0 else "", f"{name:<{width}}{text}")
    for index, (name, text) in enumerate(summary.derived):
        yield from _field("derived" if index == 0 else "", f"{name:<{width}}{text}")


def _body(summary: Summary) -> Iterator[str]:
    extra = "".join(f", mask vector {shape}" for _, shape in summary.extra)
    yield from _field("embedding", summary.embedding + extra)
    if summary.adapter:
        yield from _field("adapter", summary.adapter)
    for group in summary.groups:
        yield from _group(group)
    yield from _field("head", summary.head)
    others = len(summary.outputs) - 1
    yield from _field("outputs", summary.outputs[0] + (f" and {others} cache tensors" if others else ""))
    width = _column(9, [kind for kind, *_ in summary.caches])
    for index, (kind, shape, dtype, count) in enumerate(summary.caches):
        yield from _field("caches" if index == 0 else "", f"{count:>3} x {kind:<{width}}{shape} {dtype}")


def _group(group: Group) -> Iterator[str]:
    count = len(group.layers)
    title = f"layers {ranges(group.layers)} ({count}x)" if count > 1 else f"layer {group.layers[0]}"
    yield f"{title}: {group.cls}, {group.nodes} ops each" if count > 1 else f"{title}: {group.cls}, {group.nodes} ops"
    width = _column(24, [part.module for part in group.parts])
    for part in group.parts:
        yield f"  {part.module:<{width}}{part.cls}{linears_text(part)}"
        for mixer in group.mixers:
            if mixer.module.split(".")[0] == part.module:
                yield from _mixer(mixer)


def _column(least: int, names: Sequence[str]) -> int:
    """Width of a column that none of its names fills."""
    return max([least, *map(len, names)]) + 2


def linears_text(part: Part) -> str:
    """The linear layers of a part: `linear 576->1536 x2, 1536->576`; empty without any."""
    texts = [f"{i}->{o}" + (f" x{n}" if n > 1 else "") for i, o, n in part.linears]
    return f"   linear {', '.join(texts)}" if texts else ""


def _mixer(mixer: MixerSite) -> Iterator[str]:
    shapes = " ".join(f"{name} {shape}" for name, shape in mixer.operands if name not in ("weight", "bias"))
    yield f"    {mixer.call:<{_column(36, [mixer.call])}}{', '.join(mixer.options)}".rstrip()
    inputs = [name for name in mixer.inputs if name not in ("accepted", "layout")] or list(mixer.inputs)
    rest = [f"by {', '.join(inputs)}"] if inputs else []
    rest += [f"cache {', '.join(mixer.caches)}"] if mixer.caches else []
    for line in wrap(shapes, WIDTH - 8, break_long_words=False):
        yield f"        {line}"
    for line in wrap("; ".join([f"{mixer.streams}; {mixer.reads}", *rest]), WIDTH - 8, break_long_words=False):
        yield f"        {line}"


def _diff(summary: Summary, recorder: Recorder) -> Iterator[str]:
    yield "what each pass changed"
    lines = dict(recorder.changes([group.layers for group in summary.groups]))
    for step in summary.steps:
        provides = ", ".join(step.provides)
        yield f"  {step.step}  -> {provides}   {step.seconds:.2f} s"
        if step.sites:
            sites = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in step.sites)
            yield from (f"      {line}" for line in wrap(f"sites: {sites}", WIDTH - 6))
        changes = ", ".join(f"{name} {change:+d}" for name, change in step.delta)
        yield from (f"      {line}" for line in wrap(f"ops:   {changes or 'unchanged'}", WIDTH - 6))
        for place, changed in lines.get(step.step, ()):
            yield f"      {place}"
            yield from (f"        {sign} {line}" for sign, line in changed)


def _nodes(program: Program, layer: int) -> Iterator[str]:
    for node in layer_nodes(program, layer):
        path, _ = module_of(node)
        text = f"  {node_line(node)}"
        where = " ".join(filter(None, (shape_text(node), path.split(f"layers.{layer}.")[-1], source_line(node))))
        yield f"{text:<88} {where}"
