"""Buffers with their graphs outlive the requests that made them: capturing is slow, the next call finds them here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from .graphs import Replays, Store, power_of_two
from .plan import DecodeProgram
from .rows import Rows

EXACT = 4
"""Kinds of steps that are compiled for their own sizes: of one running request or of some, in one mode or two."""


@dataclass(frozen=True)
class Static:
    """What runs steps in buffers, whose shapes are few.

    make   gives it for a program
    after  steps of the engine before it is asked for: making it may take longer than it saves
    """

    make: Callable[[DecodeProgram], DecodeProgram]
    after: int = 0


class Stores:
    """The stores of the lanes with one key. Each is used by one lane at a time; threads may take stores at once."""

    def __init__(
        self, recorder: Callable[[], Replays], static: Callable[[DecodeProgram], DecodeProgram | None], after: int
    ) -> None:
        self._recorder = recorder
        self._static = static
        self._after = after
        self._free: list[Store] = []
        self._lock = threading.Lock()

    def take(self, like: Rows, least: int, slots: int, capacity: int) -> Store:
        """One with room for `least` requests and `capacity` positions; a new one has `slots`."""
        with self._lock:
            for store in self._free:
                if store.slots >= least and store.cache.capacity >= capacity:
                    self._free.remove(store)
                    return store
            self._free.clear()  # too small for what comes now
        pending, wanted = like.mode.pending, power_of_two(slots)
        store = Store.allocate(like.program, wanted, capacity, pending, like, self._recorder())
        store.static, store.after = self._static(like.program), self._after
        return store

    def give_back(self, store: Store) -> None:
        with self._lock:
            self._free.append(store)


class Shelf:
    """Stores by key, for an engine. static: None where steps run the program itself."""

    def __init__(self, recorder: Callable[[], Replays], static: Static | None = None) -> None:
        self._recorder = recorder
        self._given = static
        self._made: dict[int, tuple[DecodeProgram, DecodeProgram]] = {}
        self._stores: dict[Hashable, Stores] = {}
        self._lock = threading.Lock()

    def of(self, key: Hashable) -> Stores:
        with self._lock:
            if key not in self._stores:
                self._stores[key] = Stores(self._recorder, self._static, self._given.after if self._given else 0)
            return self._stores[key]

    def _static(self, program: DecodeProgram) -> DecodeProgram | None:
        """What runs steps of the program: made once, for all its stores."""
        if self._given is None:
            return None
        with self._lock:
            if id(program) not in self._made:
                self._made[id(program)] = program, self._given.make(program)
            return self._made[id(program)][1]
