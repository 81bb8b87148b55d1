"""What a request drafts next inside vLLM: whole texts are played through against a model that is a function."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flarec.serve.vllm.proposal import Proposal

MASK = 99
TOKENS = st.integers(0, 98)


def verified(
    model: Callable[[Sequence[int]], int], text: list[int], drafts: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(sampled, best) of a greedy forward: what an engine makes of a text, whose last token is pending, and drafts."""
    rows = [model([*text, *drafts[:number]]) for number in range(len(drafts) + 1)]
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == rows[accepted]:
        accepted += 1
    return [*drafts[:accepted], rows[accepted]], rows


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 10**6), st.integers(2, 6), st.lists(st.integers(0, 12)))
def test_any_model_writes_its_own_text(block: int, fewer: int, seed: int, words: int, cuts: list[int]) -> None:
    """Whatever the masks make it draft, and however an engine cuts proposals: the text is the greedy one."""
    proposal = Proposal(MASK, max(block - fewer, 1), block)

    def model(text: Sequence[int]) -> int:
        return random.Random(f"{seed} {text[-3:]}").randrange(words)

    text, alone = [1], [1]
    drafts: list[int] = []
    for cut in [*cuts, *[99] * 12]:
        drafts = drafts[:cut]
        sampled, best = verified(model, text, drafts)
        assert MASK not in sampled
        text += sampled
        drafts = proposal.next(drafts, sampled, best)
        assert len(drafts) == proposal.width and MASK in drafts
    while len(alone) < len(text):
        alone.append(model(alone))
    assert text == alone


def test_a_model_whose_masks_know_the_text_needs_one_forward_for_a_block() -> None:
    """The best case tells that rows and places belong together: B drafts of B are accepted in every step."""
    proposal = Proposal(MASK, 4, 4)
    text, steps = [0], 0
    drafts: list[int] = []
    while len(text) < 60:  # the text counts, and a mask row knows its place
        sampled, best = verified(lambda text: len(text), text, drafts)
        text, drafts, steps = text + sampled, proposal.next(drafts, sampled, best), steps + 1
    assert text == list(range(len(text)))
    # one step of the pending token alone, one behind masks only, then five tokens a step
    assert len(text) == 1 + 1 + 1 + 5 * (steps - 2)


@given(st.lists(TOKENS, max_size=4), st.data())
def test_drafts_follow_only_a_fully_accepted_block(drafts: list[int], data: st.DataObject) -> None:
    proposal = Proposal(MASK, 4, 4)
    scheduled = [*drafts, *[MASK] * (8 - len(drafts))]
    best = data.draw(st.lists(TOKENS, min_size=9, max_size=9))
    accepted = data.draw(st.integers(0, len(drafts)))
    found = proposal.next(scheduled, [*drafts[:accepted], 7], best)
    if accepted == len(drafts):
        assert found == [*best[len(drafts) + 1 :][:4], *[MASK] * 8][:8]
    else:
        assert found == [MASK] * 8


def test_a_request_within_its_prompt_drafts_nothing() -> None:
    assert Proposal(MASK, 2, 3).next([], [], [5]) == []
    assert Proposal(MASK, 2, 3).next([], [5], [5]) == [MASK] * 5


def test_drafts_without_masks_behind_them() -> None:
    """A grammar, or the end of the context, cuts a proposal: what is left is verified, and nothing follows from it."""
    assert Proposal(MASK, 2, 2).next([5, 6], [5, 6, 7], [5, 6, 7]) == [MASK] * 4
    assert Proposal(MASK, 2, 2).real([5, 6]) == 2 and Proposal(MASK, 2, 2).real([5, MASK, MASK]) == 1


def test_rows_that_are_not_those_of_the_drafts() -> None:
    with pytest.raises(ValueError, match="3 rows for 4 drafts"):
        Proposal(MASK, 2, 2).next([1, 2, MASK, MASK], [1], [1, 2, 3])
