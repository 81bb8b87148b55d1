"""An endless, resumable mixture of sources: weighted by tokens, each source shuffled anew every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.fields import LARGEST
from ...errors import CheckpointError
from .sources import TokenSource

_COLUMNS = ("epoch", "position", "drawn")  # a number per source each


class Reference(NamedTuple):
    """A document: source number and document index."""

    source: int
    document: int


    def lies_in(self, sources: Sequence[TokenSource]) -> bool:
        """Whether there is such a document."""
        known = _is_count(self.source) and _is_count(self.document) and self.source < len(sources)
        return known and self.document < len(sources[self.source])


class Mixture:
    """Draws documents so that every source's share of the tokens follows its weight. A pure function of its state.

    The next document comes from the source with the fewest tokens drawn per weight; documents of a source come in the
    order of a permutation seeded by (seed, source, epoch).
    """

    def __init__(self, sources: Sequence[TokenSource], seed: int) -> None:
        assert sources and all(len(source) for source in sources), "empty sources"
        self.sources = list(sources)
        self.seed = seed
        self._fingerprints = [source.fingerprint() for source in sources]
        self.epoch = [0] * len(sources)
        self.position = [0] * len(sources)
        self.drawn = [0] * len(sources)
        self._order = [self._permutation(number) for number in range(len(sources))]

    def _permutation(self, number: int) -> npt.NDArray[np.int64]:
        generator = np.random.default_rng([self.seed, 0, number, self.epoch[number]])
        return generator.permutation(len(self.sources[number]))

    def draw(self) -> Reference:
        """The next document."""
        number = min(range(len(self.sources)), key=lambda n: self.drawn[n] / self.sources[n].weight)
        if self.position[number] == len(self.sources[number]):
            self.epoch[number] += 1
            self.position[number] = 0
            self._order[number] = self._permutation(number)
        index = int(self._order[number][self.position[number]])
        self.position[number] += 1
        self.drawn[number] += self.sources[number].length(index)
        return Reference(number, index)

    def state_dict(self) -> dict[str, Any]:
        """The position as plain JSON values, with fingerprints of the data and the seed that it belongs to."""
        return {
            "seed": self.seed,
            "sources": list(self._fingerprints),
            "epoch": list(self.epoch),
            "position": list(self.position),
            "drawn": list(self.drawn),
        }

    def load_state_dict(self, state: Any) -> None:
        """Continue from a saved position. Raises `CheckpointError` if data, weights or seed differ from the state's,
        and for a position that these data do not have."""
        if not isinstance(state, dict):
            raise CheckpointError("the training state states no position in the data")
        if state.get("sources") != self._fingerprints or state.get("seed") != self.seed:
            raise CheckpointError(
                "the data, its weights, its tokenisation or the seed changed since the training state was saved; "
                "resume with the same ones or start again with --overwrite"
            )
        for column in (state.get(name) for name in _COLUMNS):
            if not isinstance(column, list) or len(column) != len(self.sources) or not all(map(_is_count, column)):
                raise CheckpointError("the training state states an impossible position in the data")
        if any(at > len(source) for at, source in zip(state["position"], self.sources, strict=True)):
            raise CheckpointError("the training state states a position behind the end of the data")
        self.epoch, self.position, self.drawn = (list(state[name]) for name in _COLUMNS)
        self._order = [self._permutation(number) for number in range(len(self.sources))]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST
