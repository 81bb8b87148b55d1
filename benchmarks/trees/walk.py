"""Decoding along a known answer: what every step would have verified, emitted and found ready.

The answer is what causal decoding gives, and AR-Trust of any shape gives the same, so that a step is decided by drafts
and answer alone. `Table` holds the drafts; a step says which block it finds next. Nothing is estimated: for the shapes
that the engine has, forwards are those of the engine, request by request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

MASKED, SEEN, MIXED = "masked", "seen", "mixed"
NOTHING = -1


class Key(NamedTuple):
    """A noisy block. place: of the answer's token at its anchor. kind: masked everywhere; or its first position shows
    `token`, in a noisy row (seen) or in a row of the clean stream's weights (mixed)."""

    kind: str
    place: int
    token: int = NOTHING


class Slot(NamedTuple):
    """What a noisy row drafts: the best tokens, the best one first, and by how much the scores of each two differ."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]


class Missing(Exception):
    """A block that has not been computed yet."""

    def __init__(self, key: Key) -> None:
        super().__init__(key)
        self.key = key


@dataclass
class Table:
    """The drafts along an answer. Slot i of a block at `place` drafts the answer's token `place + 1 + i`."""

    answer: Sequence[int]
    blocks: dict[Key, list[Slot]] = field(default_factory=dict)

    def drafts(self, key: Key) -> list[Slot]:
        found = self.blocks.get(key)
        if found is None:
            raise Missing(key)
        return found


class Alternative(NamedTuple):
    """Another token for a slot of the drafts: the one of that rank (0 is the draft itself, and stands for it where the
    draft is not verified). tail: how many of the drafts behind the slot follow it in its branch."""

    slot: int
    rank: int
    tail: int = 0


class Judge(Protocol):
    """How likely it is that a draft is right."""

    def right(self, slot: int, gap: float) -> float:
        """The best token of a slot, those before it being right."""
        ...

    def instead(self, rank: int, gap: float) -> float:
        """The token of that rank, those of lower ranks being wrong; gap: between it and the next one."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Shape:
    """What a step computes.

    verify        drafts that are verified, at most
    size          masked rows of a block (of one that shows a token: all of its rows)
    branches      a block behind every clean row; else one behind the last
    show          a block's first position shows the likeliest token but the draft: SEEN, MIXED, or "" (masked). The
                  row of a mixed block is verified as a branch of one token is
    believed      only where that token is right with this probability
    alternatives  branches that begin with another token, each behind the clean row that chooses it
    chosen        so many branches more, of one token each, where they are most likely right
    behind        what stands behind each end of a branch: MIXED, masked rows behind the branch's own clean rows; SEEN,
                  a block that shows the branch; "", nothing, and the next step has no drafts
    oracle        the chosen branch is always the one that the answer needs, if its rank is at most `oracle`
    """

    name: str
    verify: int
    size: int
    branches: bool = True
    show: str = ""
    believed: float = 0.0
    alternatives: tuple[Alternative, ...] = ()
    chosen: int = 0
    behind: str = MIXED
    oracle: int = 0

    @property
    def refed(self) -> int:
        """Clean rows that hold again what a branch held: branches are in no cache."""
        tails = [branch.tail + 1 for branch in self.alternatives] + [1] * bool(self.chosen or self.show == MIXED)
        return max(tails, default=0)

    @property
    def rows(self) -> int:
        """Of a step: of its shape, whether all are needed or not."""
        blocks = (self.verify + 1 if self.branches else 1) * self.size
        tails = [branch.tail for branch in self.alternatives] + [0] * self.chosen
        return self.refed + 1 + self.verify + blocks + sum(map(self._branch, tails))

    def _branch(self, tail: int) -> int:
        if not self.behind:
            return 1 + tail
        blocks = sum(1 + end + self.size for end in range(tail + 1))
        return blocks + (1 + tail if self.behind == SEEN else 0)


class Walk(NamedTuple):
    """tokens and forwards of a request, as the engine counts them (the prompt is a forward, and gives a token); steps
    that a branch ended, and tokens that branches gave beyond what the step would have."""

    tokens: int
    forwards: int
    branched: int = 0
    gained: int = 0


def walk(table: Table, shape: Shape, judge: Judge | None = None) -> Walk:
    """Decode an answer. Raises `Missing` for a block that the table lacks."""
    answer = table.answer
    last = len(answer) - 1
    place, forwards, branched, gained = 0, 1, 0, 0
    drafts: Sequence[Slot] = table.drafts(Key(MASKED, 0))[: shape.size] if last else []
    while place < last:
        forwards += 1
        verified = drafts[: shape.verify]
        count = _agree(answer, place + 1, verified)
        end = place + 1 + count  # the place of the token that the last accepted row chooses
        if end >= last:
            break
        hit = _hit(shape, drafts, count, answer[end], judge)
        shown = _shown(shape, drafts, count, judge) if hit is None else None
        if hit is None and shown == answer[end] and shape.show == MIXED:
            hit, size = Alternative(count, 1), shape.size - 1
        else:
            size = shape.size
        if hit is not None:
            place = end + 1 + _agree(answer, end + 1, drafts[count + 1 : count + 1 + hit.tail])
            branched, gained = branched + 1, gained + min(place, last) - end
            drafts = _behind(table, shape, end, place)[:size] if place < last else []
        elif not shape.branches and count < len(verified):
            place, drafts = end, []
        else:
            key = Key(MASKED, end) if shown is None else Key(shape.show, end, shown)
            place, drafts = end, table.drafts(key)[:size]
    return Walk(last + 1, forwards, branched, gained)


def _agree(answer: Sequence[int], place: int, drafts: Sequence[Slot]) -> int:
    """How many drafts for the answer's tokens from `place` on are right, up to the first wrong one. Behind the answer's
    end all are: it ends the request."""
    for count, slot in enumerate(drafts):
        if place + count < len(answer) and slot.tokens[0] != answer[place + count]:
            return count
    return len(drafts)


def _hit(shape: Shape, drafts: Sequence[Slot], count: int, token: int, judge: Judge | None) -> Alternative | None:
    """The branch behind the last accepted row that begins with the token which this row chooses."""
    if count >= len(drafts):
        return None
    first = 0 if count == shape.verify else 1  # a draft that was verified is wrong
    tokens = drafts[count].tokens
    if shape.oracle and token in tokens[first : shape.oracle + 1]:
        return Alternative(count, tokens.index(token))
    branches = shape.alternatives
    if shape.chosen and not shape.oracle:
        assert judge is not None
        branches += likely(tuple(drafts[: shape.verify + 1]), shape.verify, judge)[: shape.chosen]
    return next((b for b in branches if b.slot == count and b.rank >= first and tokens[b.rank] == token), None)


@lru_cache(maxsize=1 << 18)
def likely(drafts: tuple[Slot, ...], verify: int, judge: Judge) -> tuple[Alternative, ...]:
    """All branches of one token, the likeliest to be needed first."""
    found, reached = [], 1.0
    for slot, (tokens, gaps) in enumerate(drafts):
        right = judge.right(slot, gaps[0])
        if slot == verify:
            found.append((reached * right, Alternative(slot, 0)))
        left = reached * (1 - right)
        for rank in range(1, len(tokens)):
            share = judge.instead(rank, gaps[rank] if rank < len(gaps) else 0.0)
            found.append((left * share, Alternative(slot, rank)))
            left *= 1 - share
        reached *= right
    return tuple(branch for _, branch in sorted(found, key=lambda pair: -pair[0]))


def _shown(shape: Shape, drafts: Sequence[Slot], count: int, judge: Judge | None) -> int | None:
    """What the block behind the last accepted row shows in its first position; None: a mask."""
    if not shape.show or count >= len(drafts):
        return None
    tokens, gaps = drafts[count]
    bonus = count == shape.verify
    if shape.believed:
        assert judge is not None
        sure = judge.right(count, gaps[0]) if bonus else judge.instead(1, gaps[1])
        if sure < shape.believed:
            return None
    return tokens[0 if bonus else 1]


def _behind(table: Table, shape: Shape, end: int, place: int) -> Sequence[Slot]:
    """The drafts at `place`, behind a branch that began at `end`."""
    if shape.behind == MIXED:
        return table.drafts(Key(MASKED, place))
    if not shape.behind:
        return []
    assert place == end + 1, "a block that shows more than one token is in no table"
    return table.drafts(Key(SEEN, end, table.answer[end]))[1:]


@dataclass
class Guess(Table):
    """A table that notes what it lacks, and goes on as if the block were masked: most of what follows is the same."""

    missing: dict[Key, None] = field(default_factory=dict)

    def drafts(self, key: Key) -> list[Slot]:
        if key in self.blocks:
            return self.blocks[key]
        self.missing[key] = None
        return self.blocks[Key(MASKED, key.place)]


def complete(
    tables: Sequence[Table], shapes: Sequence[Shape], judges: Sequence[Judge]
) -> Iterator[list[list[Key]]]:
    """What the walks of all shapes seem to lack, by table, until they lack nothing; whoever iterates adds it. The
    masked blocks are there."""
    left = set(range(len(tables)))
    while left:
        wanted: list[list[Key]] = [[] for _ in tables]
        for number in sorted(left):
            guess = Guess(tables[number].answer, tables[number].blocks)
            for shape in shapes:
                walk(guess, shape, judges[number])
            wanted[number] = list(guess.missing)
            if not guess.missing:
                left.remove(number)
        if left:
            yield wanted
