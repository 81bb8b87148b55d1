"""The cache container."""

from __future__ import annotations

import torch

from flarec.decode import Cache
from flarec.ir.slots import CacheSlot

SLOTS = [
    CacheSlot("k", "keys", ("batch", 2, "capacity", 4), torch.float32),
    CacheSlot("conv", "conv", ("batch", 5, 3), torch.bfloat16),
    CacheSlot("pending", "pending_k", ("batch", "pending", 2), torch.float32),
    CacheSlot("state", "state", (2, "batch", 3), torch.float32),
]


def test_allocation() -> None:
    cache = Cache.allocate(SLOTS, 3, 70, "cpu")
    assert cache.capacity >= 70 and cache.capacity % 64 == 0
    assert {name: tuple(t.shape) for name, t in cache.tensors.items()} == {
        "k": (3, 2, cache.capacity, 4),
        "conv": (3, 5, 3),
        "pending": (3, 0, 2),
        "state": (2, 3, 3),
    }
    assert all((tensor == 0).all() for tensor in cache.tensors.values())
    assert cache.tensors["conv"].dtype == torch.bfloat16
    assert cache.accepted.tolist() == cache.length.tolist() == [0, 0, 0]


def test_reserve_keeps_contents() -> None:
    cache = Cache.allocate(SLOTS, 2, 10, "cpu")
    cache.tensors["k"].normal_()
    before, old = cache.tensors["k"].clone(), cache.capacity
    cache.reserve(old)
    assert cache.capacity == old
    cache.reserve(old + 1)
    assert cache.capacity > old
    assert torch.equal(cache.tensors["k"][:, :, :old], before) and (cache.tensors["k"][:, :, old:] == 0).all()
    cache.reserve(5000)
    assert cache.capacity >= 5000 and cache.tensors["conv"].shape == (2, 5, 3)


def test_accept_and_select() -> None:
    cache = Cache.allocate(SLOTS, 3, 10, "cpu")
    rows = torch.tensor([4, 0, 2])
    cache.accept(rows)
    cache.accepted.zero_()  # a step may clear it in place
    assert rows.tolist() == [4, 0, 2]
    cache.accept(torch.tensor([1, 2, 3]))
    cache.tensors["state"] = torch.arange(18.0).reshape(2, 3, 3)
    cache.tensors["conv"] = torch.arange(3.0)[:, None, None].expand(3, 5, 7)
    cache.select(torch.tensor([2, 0]))
    assert cache.batch == 2
    assert cache.accepted.tolist() == [3, 1] and cache.length.tolist() == [5, 5]
    assert cache.tensors["state"][0].tolist() == [[6, 7, 8], [0, 1, 2]]
    assert cache.tensors["conv"][:, 0, 0].tolist() == [2, 0] and cache.tensors["conv"].shape == (2, 5, 7)
