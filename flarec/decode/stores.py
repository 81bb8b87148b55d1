"""Buffers with their graphs outlive the requests that made them: capturing is slow, the next call finds them here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

from .graphs import Replays, Store, power_of_two
from .rows import Rows


class Stores:
    """The stores of the lanes with one key. Each is used by one lane at a time; threads may take stores at once."""

    def __init__(self, recorder: Callable[[], Replays]) -> None:
        self._recorder = recorder
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
        return Store.allocate(like.program.cache_slots, wanted, capacity, pending, like, self._recorder())

    def give_back(self, store: Store) -> None:
        with self._lock:
            self._free.append(store)


class Shelf:
    """Stores by key, for an engine."""

    def __init__(self, recorder: Callable[[], Replays]) -> None:
        self._recorder = recorder
        self._stores: dict[Hashable, Stores] = {}
        self._lock = threading.Lock()

    def of(self, key: Hashable) -> Stores:
        with self._lock:
            if key not in self._stores:
                self._stores[key] = Stores(self._recorder)
            return self._stores[key]
