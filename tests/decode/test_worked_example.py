"""The example of docs/semantics.md section 4, row by row: B = K = 3, prompt at positions 0..4."""

from __future__ import annotations

import pytest

from tests.decode.fake_model import FakeModel
from tests.decode.helpers import make_engine

PROMPT = [4, 0, 7, 7, 2]


def masked_blocks(model: FakeModel, *anchors: int) -> list[tuple[int, list[int]]]:
    return [(anchor, [model.mask] * 3) for anchor in anchors]


def test_branches() -> None:
    # the block anchored at 5 drafts 6 and 7 rightly and 8 wrongly; the one anchored at 8 is all right
    model = FakeModel(right=lambda anchor, offset: not (anchor == 5 and offset == 2))
    engine, program = make_engine(model, 3)
    emitted: list[list[int]] = []
    result = engine.generate(
        [PROMPT], mode="ar-trust", max_new_tokens=8, on_tokens=lambda index, tokens: emitted.append(tokens)
    )[0]
    assert [call.clean for call in program.calls] == [[[0, 1, 2, 3, 4]], [[5, 6, 7, 8]], [[8, 9, 10, 11]]]
    assert [call.blocks[0] for call in program.calls] == [
        masked_blocks(model, 5),
        masked_blocks(model, 6, 7, 8, 9),
        masked_blocks(model, 9, 10, 11, 12),
    ]
    assert [len(tokens) for tokens in emitted] == [1, 3, 4]  # x5; x6 x7 and x8 by row 7; x9 x10 x11 and the bonus x12
    assert result.forwards == 3 and result.accepted == [0, 0, 1, 1]
    own, right, wrong = "clean", "accepted", "corrected"
    assert result.origins == [own, right, right, wrong, right, right, right, own]
    assert [call.heads for call in program.calls] == [1 + 3, 4 + 12, 4 + 12]


def test_single_branch_with_a_cold_step() -> None:
    model = FakeModel(right=lambda anchor, offset: not (anchor == 5 and offset == 2))
    engine, program = make_engine(model, 3)
    emitted: list[list[int]] = []
    result = engine.generate(
        [PROMPT],
        mode="ar-trust",
        max_new_tokens=9,
        drafts="single",
        on_tokens=lambda index, tokens: emitted.append(tokens),
    )[0]
    assert [call.clean[0] for call in program.calls] == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [8], [9, 10, 11, 12]]
    assert [call.blocks[0] for call in program.calls] == [masked_blocks(model, anchor) for anchor in (5, 9, 9, 13)]
    assert [len(tokens) for tokens in emitted] == [1, 3, 1, 4]
    assert result.forwards == 4 and result.accepted == [1, 0, 1, 1]
    own, right, wrong = "clean", "accepted", "corrected"
    assert result.origins == [own, right, right, wrong, own, right, right, right, own]  # a cold step rejects nothing


def always(anchor: int, offset: int) -> bool:
    return True


def never(anchor: int, offset: int) -> bool:
    return False


@pytest.mark.parametrize("drafts", ["branches", "single"])
def test_extremes(drafts: str) -> None:
    """All drafts right: B + 1 tokens per step. All wrong: one per step, and a cold step after each with one block."""
    for right, forwards in ((True, 1 + 5), (False, 1 + 20)):
        engine, program = make_engine(FakeModel(right=always if right else never), 3)
        result = engine.generate([PROMPT], mode="ar-trust", max_new_tokens=21, drafts=drafts)[0]
        assert result.new_tokens == 21 and result.forwards == forwards
        rows = [len(call.clean[0]) for call in program.calls[1:]]
        cold = drafts == "single" and not right
        assert rows == ([4, 1] * 10 if cold else [4] * (forwards - 1))


def test_denoising_steps_carry_the_commit() -> None:
    """Threshold 1 commits one position per step; the finished block rides on the next block's first step."""
    model = FakeModel()
    engine, program = make_engine(model, 3, readout="block_end")
    result = engine.generate([PROMPT], mode="diffusion-trust", max_new_tokens=9, threshold=1.0)[0]
    assert [call.clean[0] for call in program.calls] == [
        [0, 1, 2, 3, 4], [], [], [5, 6, 7], [], [], [8, 9, 10], [], [],
    ]
    assert [call.blocks[0][0][0] for call in program.calls] == [5, 5, 5, 8, 8, 8, 11, 11, 11]
    hidden = [call.blocks[0][0][1].count(model.mask) for call in program.calls]
    assert hidden == [3, 2, 1] * 3
    assert [call.heads for call in program.calls] == [3, 2, 2] * 3
    assert result.forwards == 9 and result.accepted == [0, 9]
