"""Hypothesis strategies for valid layouts: several rows and documents, prompts without noisy copies, views, mixed
readouts, short last blocks, anchors anywhere (document start, chunk borders, document end), padding, cached
prefixes."""

from __future__ import annotations

from hypothesis import strategies as st

from flarec.layout import Block, Layout, build_layout


@st.composite
def blocks_of_document(draw: st.DrawFn, document: int, first: int, last: int, max_block: int) -> list[Block]:
    """Blocks of one document whose readable clean tokens end anywhere in first..last (both are legal anchors)."""
    size = draw(st.integers(1, max_block))
    readout = st.sampled_from(["block_end", "causal"])
    blocks = []
    if draw(st.booleans()):  # a response grid, once per view, behind a prompt
        prompt = draw(st.integers(first, last))
        for view in range(draw(st.integers(1, 2))):
            for anchor in range(prompt, last, size):
                length = size if draw(st.booleans()) else min(size, last - anchor)
                blocks.append(Block(document, anchor, length, view, draw(readout)))
    else:  # blocks anywhere, as a draft-and-verify step has them
        for _ in range(draw(st.integers(0, 3))):
            anchor = draw(st.one_of(st.sampled_from([first, last]), st.integers(first, last)))
            blocks.append(
                Block(document, anchor, draw(st.integers(1, max_block)), draw(st.integers(0, 1)), draw(readout))
            )
    return blocks


@st.composite
def layouts(
    draw: st.DrawFn,
    *,
    max_rows: int = 2,
    max_documents: int = 3,
    max_clean: int = 12,
    max_block: int = 8,
    cache: bool | None = None,
    single_document: bool = False,
) -> Layout:
    """A valid layout with at least one real token. cache: True = every row continues a cache, False = none does, None
    = either."""
    rows = draw(st.integers(1, max_rows))
    documents: list[list[int]] = []
    blocks: list[list[Block]] = []
    cached: list[int] = []
    denoising = cache is not False and draw(st.integers(0, 5)) == 0  # no clean token at all, everything is cached
    for _ in range(rows):
        past = draw(st.integers(1, 9)) if denoising or (draw(st.booleans()) if cache is None else cache) else 0
        count = 1 if single_document or denoising else draw(st.integers(1, max_documents))
        lengths = [draw(st.integers(0 if index == 0 and past else 1, max_clean)) for index in range(count)]
        lengths = [0] if denoising else lengths
        row_blocks: list[Block] = []
        for index, length in enumerate(lengths):
            first = past if index == 0 else 0
            row_blocks += draw(blocks_of_document(index, first, first + length, max_block))
        documents.append(lengths)
        blocks.append(draw(st.permutations(row_blocks)))
        cached.append(past)
    if not any(sum(row) for row in documents) and not any(blocks):
        blocks[0] = [Block(0, cached[0], 1)]
    clean, noisy = max(sum(row) for row in documents), max(sum(b.length for b in row) for row in blocks)
    extra = st.integers(0, 2)
    layout = build_layout(
        documents,
        blocks,
        cached=cached,
        clean_length=clean + draw(extra),
        noisy_length=noisy + draw(extra),
    )
    return layout.validate()
