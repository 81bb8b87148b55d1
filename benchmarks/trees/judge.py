"""How likely a draft is right, from drafts of other answers: the larger the lead of its score, the likelier."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .walk import MASKED, Table

BINS = 8


@dataclass(frozen=True)
class Curve:
    """Shares by the lead of a score: of equally many observations each; without any, none."""

    edges: tuple[float, ...]
    shares: tuple[float, ...]

    @staticmethod
    def of(seen: Sequence[tuple[float, bool]], bins: int = BINS) -> Curve:
        """seen: (lead, whether right). Equal leads stay together."""
        ordered = sorted(seen, key=lambda pair: pair[0])
        leads = [lead for lead, _ in ordered]
        cuts = sorted({bisect_left(leads, leads[len(leads) * part // bins]) for part in range(bins)} if leads else {0})
        parts = [ordered[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(ordered)], strict=True)]
        shares = tuple(sum(right for _, right in part) / max(1, len(part)) for part in parts)
        return Curve(tuple(part[0][0] for part in parts[1:]), shares)

    def at(self, lead: float) -> float:
        return self.shares[bisect_right(self.edges, lead)]


class Measured:
    """`Judge` by the masked blocks of some answers: of the drafts that those before them made worth verifying."""

    def __init__(self, tables: Iterable[Table], slots: int, ranks: int) -> None:
        first: list[list[tuple[float, bool]]] = [[] for _ in range(slots)]
        other: list[list[tuple[float, bool]]] = [[] for _ in range(ranks)]
        for table in tables:
            for key, block in table.blocks.items():
                if key.kind != MASKED:
                    continue
                for slot, (tokens, gaps) in enumerate(block[: len(table.answer) - 1 - key.place]):
                    truth = table.answer[key.place + 1 + slot]
                    if slot < slots:
                        first[slot].append((gaps[0], tokens[0] == truth))
                    if tokens[0] == truth:
                        continue
                    for rank in range(1, len(tokens)):
                        other[rank].append((gaps[rank] if rank < len(gaps) else 0.0, tokens[rank] == truth))
                        if tokens[rank] == truth:
                            break
                    break
        self._first, self._other = [Curve.of(seen) for seen in first], [Curve.of(seen) for seen in other]

    def right(self, slot: int, gap: float) -> float:
        return self._first[min(slot, len(self._first) - 1)].at(gap)

    def instead(self, rank: int, gap: float) -> float:
        return self._other[rank].at(gap)

    @property
    def instead_shares(self) -> list[float]:
        """By rank from 1: how often its token is right where those before it are wrong."""
        return [sum(curve.shares) / len(curve.shares) for curve in self._other[1:]]
