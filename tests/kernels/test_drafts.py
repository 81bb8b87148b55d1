"""Between the choices of an AR-Trust step: PyTorch and Triton give the same integers, and those of a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flarec.kernels.drafts import NextDrafts, Verified, keep, verify
from flarec.kernels.sampling import UNCHOSEN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, SIZE = 12, 5


def moved(values: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if value is None else value.cpu() for value in values]


def loop(choice: Tensor, drafts: Tensor, have: Tensor, right: Tensor | None) -> list[int]:
    """Accepted drafts of every row."""
    found = []
    for row in range(len(choice)):
        number = 0
        for slot in range(min(int(have[row]), choice.shape[1] - 1)):
            if not (drafts[row, slot] == choice[row, slot] if right is None else right[row, slot]):
                break
            number += 1
        found.append(number)
    return found


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_what_is_accepted_and_kept(count: int, said: bool, implementation: str) -> None:
    generator = torch.Generator().manual_seed(count)

    def drawn(low: int, high: int, *sizes: int) -> Tensor:
        return torch.randint(low, high, sizes, generator=generator)

    choice, drafts = drawn(0, 2, ROWS, count + 1), drawn(0, 2, ROWS, SIZE)
    choice[:3, 0] = UNCHOSEN
    have, length, active = drawn(0, SIZE + 1, ROWS), drawn(0, 99, ROWS), drawn(0, 2, ROWS) > 0
    right = drawn(0, 2, ROWS, count) > 0 if said else None
    accepted = loop(choice, drafts, have, right)
    for branches in (True, False):
        blocks, drafted = (count + 1 if branches else 1), 3
        given = [None if x is None else x.to(DEVICE) for x in (choice, drafts, have, length, active, right)]
        found = verify(
            *given[:5], blocks=blocks, heads=drafted, right=given[5],  # type: ignore[arg-type]
            implementation=implementation,
        )
        numbers = torch.tensor(accepted)
        commit = (numbers + 1) * active
        row = torch.arange(ROWS)
        token = choice[row, numbers]
        place = (row * blocks + numbers)[:, None] * drafted + torch.arange(drafted)
        wanted = Verified(numbers, commit, length + commit, token, place.reshape(-1) if blocks > 1 else None)
        for got, expected in zip(moved(found), wanted, strict=True):
            assert got is expected is None or torch.equal(got, expected)  # type: ignore[arg-type]
        draft = drawn(UNCHOSEN, 9, ROWS, drafted)
        kept = keep(found, choice.to(DEVICE), draft.to(DEVICE), have.to(DEVICE), SIZE, branches=branches,
                    implementation=implementation)
        useful = torch.ones(ROWS, dtype=torch.bool) if branches else numbers == have.clamp_max(count)
        now = useful * drafted
        padded = torch.zeros(ROWS, SIZE, dtype=torch.int64)
        padded[:, :drafted] = draft.clamp_min(0)
        report = torch.cat([numbers[:, None], now[:, None], choice], dim=1)
        for got, expected in zip(moved(kept), NextDrafts(token.clamp_min(0), padded, now, report), strict=True):
            assert torch.equal(got, expected)  # type: ignore[arg-type]
