"""Buffers with their graphs outlive the requests that made them: capturing is slow, the next call finds them here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from .graphs import Replays, Store, power_of_two
from .plan import DecodeProgram
from .rows import Rows

READ_AFTER = 1 << 18
"""Tokens of prompts after which prefills are compiled, too: some dozens of long prompts."""


@dataclass(frozen=True)
class Static:
    """What runs steps in buffers, whose shapes are few; and what reads prompts once there were many.

    make        gives what runs steps for a program
    after       steps of the engine before it is asked for: making it may take longer than it saves
    read        gives what reads prompts for a program, in pieces of any size; None: the program does
    read_after  tokens of prompts before it is asked for
    """

    make: Callable[[DecodeProgram], DecodeProgram]
    after: int = 0
    read: Callable[[DecodeProgram], DecodeProgram] | None = None
    read_after: int = READ_AFTER


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
        store.static, store.after, store.bare = self._static(like.program), self._after, like.bare
        store.bare_static = None if like.bare is None else self._static(like.bare)
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
        self._readers: dict[int, tuple[DecodeProgram, DecodeProgram]] = {}
        self._stores: dict[Hashable, Stores] = {}
        self._lock = threading.Lock()

    def of(self, key: Hashable) -> Stores:
        with self._lock:
            if key not in self._stores:
                self._stores[key] = Stores(self._recorder, self._static, self._given.after if self._given else 0)
            return self._stores[key]

    def _static(self, program: DecodeProgram) -> DecodeProgram | None:
        """What runs steps of the program: made once, for all its stores."""
        return None if self._given is None else self._once(self._made, program, self._given.make)

    def reader(self, program: DecodeProgram, tokens: int) -> DecodeProgram:
        """What reads prompts of the program after so many tokens of prompts."""
        if self._given is None or self._given.read is None or tokens < self._given.read_after:
            return program
        return self._once(self._readers, program, self._given.read)

    def _once(
        self, known: dict[int, tuple[DecodeProgram, DecodeProgram]], program: DecodeProgram,
        make: Callable[[DecodeProgram], DecodeProgram],
    ) -> DecodeProgram:
        with self._lock:
            if id(program) not in known:
                known[id(program)] = program, make(program)
            return known[id(program)][1]
