"""Who reads whom, written as plain Python loops straight from docs/semantics.md section 1. Imports no kernel.

Tokens of a row are numbered as in the lowered graph: clean slots, then noisy slots. "Past" tokens are clean tokens of
document 0 that an earlier forward left in the cache, numbered by their document position.
"""

from __future__ import annotations

from dataclasses import dataclass

from flarec.layout import CAUSAL, Layout


@dataclass(frozen=True)
class Token:
    """One token of a row; block is None for a clean token."""

    slot: int
    document: int
    position: int
    block: int | None
    anchor: int
    causal: bool


def tokens(layout: Layout, row: int) -> list[Token]:
    """The tokens of a row, padding left out, in slot order."""
    found = []
    for slot in range(layout.clean_length):
        document = int(layout.clean_document[row, slot])
        if document >= 0:
            found.append(Token(slot, document, int(layout.clean_position[row, slot]), None, -1, True))
    for index in range(layout.noisy_length):
        block = int(layout.noisy_block[row, index])
        if block >= 0:
            found.append(
                Token(
                    slot=layout.clean_length + index,
                    document=int(layout.block_document[row, block]),
                    position=int(layout.noisy_position[row, index]),
                    block=block,
                    anchor=int(layout.block_anchor[row, block]),
                    causal=int(layout.block_readout[row, block]) == CAUSAL,
                )
            )
    return found


def reads(reader: Token, other: Token) -> bool:
    """Whether `reader` may depend on `other` (both of one row)."""
    if reader.document != other.document:
        return False
    if reader.block is None:  # the clean stream: token-causal, never noisy
        return other.block is None and other.position <= reader.position
    if other.block is None:
        return other.position < reader.anchor
    if other.block != reader.block:
        return False
    return other.position <= reader.position if reader.causal else True


def reads_past(reader: Token, position: int) -> bool:
    """Whether `reader` may depend on the cached clean token of document 0 at `position` (which is below `cached`)."""
    limit = reader.position + 1 if reader.block is None else reader.anchor
    return reader.document == 0 and position < limit


def visible_slots(layout: Layout, row: int) -> dict[int, set[int]]:
    """Slot of every real token -> slots it reads."""
    row_tokens = tokens(layout, row)
    return {reader.slot: {other.slot for other in row_tokens if reads(reader, other)} for reader in row_tokens}


def conv_lag(layout: Layout, row: int, reader: Token, lag: int) -> tuple[str, int] | None:
    """What a causal convolution reads at `lag`: ("slot", s), ("past", position) or None (zero)."""
    position = reader.position - lag
    for other in tokens(layout, row):
        if other.document != reader.document or other.position != position:
            continue
        if reader.block is None and other.block is None:
            return "slot", other.slot
        if reader.block is not None and other.block == reader.block:
            return "slot", other.slot
        if reader.block is not None and other.block is None and position < reader.anchor:
            return "slot", other.slot
    if reader.document == 0 and 0 <= position < int(layout.cached[row]):
        return "past", position
    return None
