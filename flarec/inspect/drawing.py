"""A summary as SVG: the program, and the attention mask and state schedule of a small example layout."""

from __future__ import annotations

from flarec import ops
from flarec.kernels.linear_attention.panels.schedule import StateSchedule
from flarec.kernels.softmax_attention.mask import visibility
from flarec.layout import Block, Layout, build_layout

from .canvas import Canvas
from .summary import Summary
from .text import linears_text, ranges

MARGIN = 24
INK, QUIET, RULE = "#1f2933", "#616e7c", "#cbd2d9"
PROMPT, RESPONSE, VIEWS = "#9fb3c8", "#486581", ("#e8833a", "#b44d9b")
CAUSAL, PREFIX, OWN = "#6c8ff0", "#3ebd93", "#f0b429"
COLOUR = {"attention": "#2f80c2", "state": "#3f9b57", "none": "#8d6cc9"}
"""Of an op, by what it mixes."""
CELL = 13
EXAMPLE_CHUNK = 4
PROMPTS, RESPONSES, BLOCK = (3, 2), (6, 4), 3


def example_layout() -> Layout:
    """Two documents in one row (prompts of 3 and 2 tokens, responses of 6 and 4), blocks of 3, two views."""
    blocks = [
        Block(document, anchor, BLOCK, view)
        for document, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
        for view in (0, 1)
        for anchor in range(prompt, prompt + response, BLOCK)
    ]
    lengths = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    return build_layout([lengths], [blocks]).validate()


def as_svg(summary: Summary) -> str:
    """The drawing; its lower panels show `example_layout`, computed by the code that training runs: the mask, and for
    models with states the schedule."""
    canvas = Canvas()
    canvas.offset = (MARGIN, MARGIN)
    _program(canvas, summary)
    layout = example_layout()
    top = canvas.extent[1] + 40
    canvas.offset = (MARGIN, top)
    _mask(canvas, layout)
    if _has_states(summary):
        canvas.offset = (MARGIN + 46 + layout.length * CELL + 64, top)
        _schedule(canvas, layout)
    return canvas.document(MARGIN)


def _has_states(summary: Summary) -> bool:
    kinds = {mixer.kind for group in summary.groups for mixer in group.mixers}
    return any(mixer.name in kinds and mixer.mixing == "state" and mixer.name != "short_conv" for mixer in ops.mixers())


def _program(canvas: Canvas, summary: Summary) -> None:
    canvas.text(
        0, 14, f"{summary.model}: {summary.layers} layers, {summary.parameters:,} parameters", size=17, bold=True
    )
    done = [step.step.removesuffix("()") for step in summary.steps]
    canvas.text(0, 36, "passes: " + " > ".join(done), size=12, fill=QUIET)
    _strip(canvas, summary, 56)
    y = 56 + 68.0
    canvas.text(0, y, f"embedding  {summary.embedding}", fill=QUIET)
    for group in summary.groups:
        y += 14
        count = len(group.layers)
        mixers = group.mixers
        parts = [part for part in group.parts if part.linears]
        height = 26 + 34 * len(mixers) + 18 * len(parts)
        canvas.rect(0, y, 1100, height, "#f5f7fa", stroke=RULE, radius=6)
        canvas.text(12, y + 18, f"layer{'s' if count > 1 else ''} {ranges(group.layers)}", bold=True)
        canvas.text(1088, y + 18, f"{group.cls}, {group.nodes} ops", fill=QUIET, anchor="end")
        for index, mixer in enumerate(mixers):
            top = y + 28 + 34 * index
            canvas.rect(12, top, 6, 28, _colour(mixer.kind), radius=2)
            options = ", ".join(mixer.options)
            canvas.text(26, top + 11, f"{mixer.call}   {options}", size=12)
            shapes = "  ".join(f"{name} {shape}" for name, shape in mixer.operands if name not in ("weight", "bias"))
            canvas.text(26, top + 25, shapes, size=10.5, fill=QUIET)
            inputs = [name for name in mixer.inputs if name not in ("accepted", "layout")] or list(mixer.inputs)
            canvas.text(1088, top + 11, mixer.reads, size=10.5, fill=QUIET, anchor="end")
            caches = f", cache: {', '.join(mixer.caches)}" if mixer.caches else ""
            canvas.text(
                1088,
                top + 25,
                (f"by {', '.join(inputs)}" if inputs else "") + caches,
                size=10.5,
                fill=QUIET,
                anchor="end",
            )
        for index, part in enumerate(parts):
            top = y + 28 + 34 * len(mixers) + 18 * index
            canvas.rect(12, top, 6, 12, RULE, radius=2)
            canvas.text(26, top + 10, f"{part.module}   {part.cls}{linears_text(part)}", size=11, fill=QUIET)
        y += height
    y += 20
    canvas.text(0, y, f"head  {summary.head}", fill=QUIET)


def _colour(kind: str) -> str:
    return next((COLOUR[mixer.mixing] for mixer in ops.mixers() if mixer.name == kind), RULE)


def _strip(canvas: Canvas, summary: Summary, y: float) -> None:
    """One box per layer, in the colour of its last mixer, with a legend below."""
    kinds = summary.layer_kinds()
    width = min(40.0, 1100 / max(1, len(kinds)))
    for place, (layer, names) in enumerate(kinds.items()):
        colour = _colour(names.split(" + ")[-1])
        canvas.rect(place * width, y, width - 3, 24, colour, radius=3, title=f"layer {layer}: {names}")
        if width > 18:
            canvas.text(place * width + (width - 3) / 2, y + 16, str(layer), size=10, fill="#ffffff", anchor="middle")
    x = 0.0
    for names in dict.fromkeys(kinds.values()):
        canvas.rect(x, y + 32, 11, 11, _colour(names.split(" + ")[-1]), radius=2)
        canvas.text(x + 16, y + 42, names, size=11, fill=QUIET)
        x += 40 + 7 * len(names)


def _tokens(layout: Layout) -> list[tuple[str, str]]:
    """(colour, description) of every slot of the example row."""
    result = []
    for document, position in zip(layout.clean_document[0].tolist(), layout.clean_position[0].tolist(), strict=True):
        prompt = position < PROMPTS[document]
        kind = "prompt" if prompt else "response"
        result.append((PROMPT if prompt else RESPONSE, f"clean, document {document}, {kind} position {position}"))
    for block, position in zip(layout.noisy_block[0].tolist(), layout.noisy_position[0].tolist(), strict=True):
        document, view = int(layout.block_document[0, block]), int(layout.block_view[0, block])
        result.append((VIEWS[view], f"noisy, document {document}, view {view}, position {position}"))
    return result


def _mask(canvas: Canvas, layout: Layout) -> None:
    mask, clean = visibility(layout)[0], layout.clean_length
    tokens = _tokens(layout)
    size = layout.length * CELL
    canvas.text(0, 0, "Attention mask: who reads whom in an example row", size=14, bold=True)
    _legend(canvas, 0, 22, [
        (PROMPT, "clean prompt"), (RESPONSE, "clean response"), (VIEWS[0], "noisy view 0"), (VIEWS[1], "noisy view 1"),
    ])
    _legend(
        canvas, 0, 40, [(CAUSAL, "causal in its document"), (PREFIX, "clean before the anchor"), (OWN, "own block")]
    )
    left, top = 46, 80
    canvas.text(left + size / 2, top - 20, "key", size=11, fill=QUIET, anchor="middle")
    canvas.text(left - 20, top - 5, "query", size=11, fill=QUIET, anchor="end")
    for index, (colour, title) in enumerate(tokens):
        canvas.rect(left + index * CELL, top - 14, CELL - 1, 10, colour, title=title)
        canvas.rect(left - 14, top + index * CELL, 10, CELL - 1, colour, title=title)
    for query in range(layout.length):
        for key in range(layout.length):
            x, y = left + key * CELL, top + query * CELL
            if not bool(mask[query, key]):
                canvas.rect(x, y, CELL - 1, CELL - 1, "#f0f2f5")
                continue
            colour = OWN if key >= clean else CAUSAL if query < clean else PREFIX
            canvas.rect(x, y, CELL - 1, CELL - 1, colour, title=f"{tokens[query][1]} reads {tokens[key][1]}")
    edge = clean * CELL - 0.5
    canvas.line(left + edge, top, left + edge, top + size, INK)
    canvas.line(left, top + edge, left + size, top + edge, INK)
    canvas.text(left + edge / 2, top + size + 14, "clean", size=11, fill=QUIET, anchor="middle")
    canvas.text(left + (edge + size) / 2, top + size + 14, "noisy", size=11, fill=QUIET, anchor="middle")


def _legend(canvas: Canvas, x: float, y: float, entries: list[tuple[str, str]]) -> None:
    for colour, text in entries:
        canvas.rect(x, y - 9, 11, 11, colour, radius=2)
        canvas.text(x + 16, y, text, size=11, fill=QUIET)
        x += 34 + 6.2 * len(text)


def _schedule(canvas: Canvas, layout: Layout) -> None:
    canvas.text(0, 0, "State schedule: where each noisy block starts", size=14, bold=True)
    canvas.text(
        0,
        20,
        f"Chunks of {EXAMPLE_CHUNK} clean tokens restart at every document; a block starts from the clean",
        size=11,
        fill=QUIET,
    )
    canvas.text(
        0,
        36,
        "state after its anchor - 1: its chunk's entry state and the chunk's tokens before the anchor.",
        size=11,
        fill=QUIET,
    )
    schedule = StateSchedule.from_layout(layout, chunk_size=EXAMPLE_CHUNK)
    step, y = 34.0, 76.0
    for document, length in enumerate(p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)):
        y = _document(canvas, layout, schedule, document, length, y, step) + 40


def _document(
    canvas: Canvas, layout: Layout, schedule: StateSchedule, document: int, length: int, y: float, step: float
) -> float:
    """One document: its chunks, its clean tokens, and below them its blocks, view by view. Returns the lower edge."""
    left = 92.0
    canvas.text(0, y + 18, f"document {document}", size=12, bold=True)
    for first in range(0, length, schedule.chunk_size):
        last = min(first + schedule.chunk_size, length)
        canvas.rect(left + first * step - 2, y - 6, (last - first) * step, 38, "#f5f7fa", stroke=RULE, radius=5)
        canvas.text(left + first * step + 2, y - 10, f"chunk {first // schedule.chunk_size}", size=10, fill=QUIET)
    for position in range(length):
        colour = PROMPT if position < PROMPTS[document] else RESPONSE
        canvas.rect(left + position * step, y, step - 5, 26, colour, radius=4)
        canvas.text(
            left + position * step + (step - 5) / 2, y + 17, str(position), size=11, fill="#ffffff", anchor="middle"
        )
    lower = y + 62
    for view in (0, 1):
        canvas.text(0, lower + 16, f"view {view}", size=11, fill=QUIET)
        for block in range(layout.blocks):
            if int(layout.block_document[0, block]) != document or int(layout.block_view[0, block]) != view:
                continue
            anchor = int(layout.block_anchor[0, block])
            chunk, inside = start_of(layout, schedule, block)
            x = left + anchor * step
            source = left + (chunk * schedule.chunk_size + inside) * step - 3
            canvas.line(source, y + 28, x + 2, lower - 2, "#52606d", arrow=True)
            canvas.rect(x, lower, BLOCK * step - 5, 24, VIEWS[view], radius=4)
            canvas.text(
                x + (BLOCK * step - 5) / 2,
                lower + 16,
                f"entry {chunk} + {inside}",
                size=11,
                fill="#ffffff",
                anchor="middle",
            )
        lower += 40
    return lower


def start_of(layout: Layout, schedule: StateSchedule, block: int) -> tuple[int, int]:
    """(chunk inside the document, clean tokens of that chunk) from which a block of row 0 starts, as scheduled."""
    token = layout.clean_length + int((layout.noisy_block[0] == block).nonzero()[0])
    panel, row = ((schedule.panel_token == token).nonzero()[0]).tolist()
    first = int(schedule.clean_token[int(schedule.panel_chunk[panel])].clamp_min(0)[0])
    return int(layout.clean_position[0, first]) // schedule.chunk_size, int(schedule.panel_anchor[panel, row])
