"""The oracle and the strategy themselves: the worked example of docs/semantics.md, and coverage of the cases that
matter."""

from __future__ import annotations

from hypothesis import find, settings

from flarec.layout import Block, Layout, build_layout
from tests.oracles.layouts import layouts
from tests.oracles.visibility import visible_slots


def test_hand_written_example() -> None:
    # clean 0 1 2 | 3 (second document); block of document 0 at anchor 2, read whole; block of document 1 at 0, causal
    layout = build_layout([[3, 1]], [[Block(0, 2, 2), Block(1, 0, 2, 0, "causal")]])
    assert visible_slots(layout, 0) == {
        0: {0},
        1: {0, 1},
        2: {0, 1, 2},
        3: {3},
        4: {0, 1, 4, 5},
        5: {0, 1, 4, 5},
        6: {6},
        7: {6, 7},
    }


def test_strategy_reaches_the_hard_cases() -> None:
    def mixed_readouts(layout: Layout) -> bool:
        used = layout.block_document >= 0
        return len(set(layout.block_readout[used].tolist())) == 2

    cases = {
        "mixed readouts": mixed_readouts,
        "no clean token but a block": lambda x: bool((x.clean_document < 0).all()) and bool((x.noisy_block >= 0).any()),
        "two documents": lambda x: bool((x.clean_document == 1).any()),
        "cached": lambda x: bool((x.cached > 0).any()),
        "noisy padding": lambda x: bool((x.noisy_block < 0).any()),
        "anchor at a document end": lambda x: bool((x.block_anchor == x.cached[:, None] + 5).any()),
    }
    for case in cases.values():
        find(layouts(), case, settings=settings(max_examples=500, database=None))
