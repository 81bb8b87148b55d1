"""The shapes of a step that are compared, by family, and what a step costs by its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .walk import MIXED, SEEN, Alternative, Shape

MOST_ROWS = 40
BUDGETS = (16, 24, 40)
BELIEVED = (0.0, 0.5)
FIXED: dict[str, tuple[Alternative, ...]] = {
    "two at slot 1": (Alternative(0, 1),),
    "three at slot 1": (Alternative(0, 1), Alternative(0, 2)),
    "two at slots 1 and 2": (Alternative(0, 1), Alternative(1, 1)),
    "three at slot 1, two at slot 2": (Alternative(0, 1), Alternative(0, 2), Alternative(1, 1)),
    "two at slot 1 and a tail": (Alternative(0, 1, 1),),
}
BEHIND = {MIXED: "tree", SEEN: "tree, blocks that show it", "": "tree, nothing behind"}
CHOSEN, FEW = (1, 2, 3, 4, 5, 6, 8, 10), 4


def shapes(block: int, most: int = MOST_ROWS) -> dict[str, list[Shape]]:
    """By family, those of at most so many rows. block: positions per block as trained."""
    sizes = [(verify, size) for size in range(1, block + 1) for verify in range(max(1, size - 1), size + 1)]
    families: dict[str, list[Shape]] = {
        "one block per outcome": [Shape(f"{v} drafts, blocks of {s}", v, s) for v, s in sizes],
        "one block": [Shape(f"{v} drafts, one block", v, v, branches=False) for v in range(1, block + 1)],
        "first token shown": list(_shown(block, SEEN)),
        "first token shown and verified": list(_shown(block, MIXED)),
        "at most the second choice, always the right branch": [
            Shape(f"{v} drafts, blocks of {s}, oracle", v, s, chosen=1, oracle=1) for v, s in sizes
        ],
    }
    for behind, name in BEHIND.items():
        families[name] = list(_trees(sizes, behind, most))
    return {name: [shape for shape in found if shape.rows <= most] for name, found in families.items()}


def _shown(block: int, kind: str) -> Iterator[Shape]:
    for verify, size in ((block, block), (block - 1, block), (2, 2)):
        for believed in BELIEVED if verify else ():
            name = f"{verify} drafts, blocks of {size}, shown from {believed}"
            yield Shape(name, verify, size, show=kind, believed=believed)


def _trees(sizes: list[tuple[int, int]], behind: str, most: int) -> Iterator[Shape]:
    for verify, size in sizes:
        plain = f"{verify} drafts, blocks of {size}"
        for name, branches in FIXED.items():
            deep = max(branch.slot + branch.tail for branch in branches)
            if deep < verify and (behind != SEEN or not any(branch.tail for branch in branches)):
                yield Shape(f"{plain}, {name}", verify, size, alternatives=branches, behind=behind)
        for chosen in CHOSEN:
            shape = Shape(f"{plain}, {chosen} chosen", verify, size, chosen=chosen, behind=behind)
            if shape.rows > most or (not behind and chosen > FEW):
                break
            yield shape


class Costs:
    """Milliseconds of a step by its rows: a line through causal and AR-Trust steps as they were measured."""

    def __init__(self, record: Path) -> None:
        found = json.loads(record.read_text())
        rows = {row["name"]: row["values"] for row in found["rows"]}
        self.requests = [number for number in (1, 8, 32) if f"ar-trust-step-{number}" in rows]
        self._ends = {
            number: (rows[f"ar-trust-step-{number}"]["causal_ms"], rows[f"ar-trust-step-{number}"]["ar_trust_ms"])
            for number in self.requests
        }

    def milliseconds(self, rows: int, requests: int) -> float:
        """4 clean rows and 4 blocks of 3 were measured, and 1 row."""
        causal, trust = self._ends[requests]
        return causal + (trust - causal) * (rows - 1) / 15
