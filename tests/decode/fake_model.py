"""A decode program without weights whose logits are pure functions of exactly what a row may read.

Clean logits after a prefix are random numbers seeded by the whole prefix. Noisy logits mix the clean logits of a
guessed continuation with random numbers seeded by the prefix before the anchor and the visible tokens of the block, so
a draft is right sometimes. The program keeps the prefix in its caches in four ways (keys, a rolling hash as recurrent
state, a convolution window, pending rows), follows the deferred commit and checks that all of them agree with the
layout: one wrong `accepted`, `cached`, position or anchor fails an assertion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from flarec.decode.cache import Cache
from flarec.ir.slots import CacheSlot
from flarec.layout import READOUTS, Layout

WORD = 2**64
WINDOW = 3  # width of the convolution


def roll(state: int, token: int) -> int:
    """One step of the recurrence: a hash of the prefix."""
    state = ((state ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % WORD
    return state ^ (state >> 29)


def prefix_state(tokens: Sequence[int], start: int = 0) -> int:
    state = start
    for token in tokens:
        state = roll(state, token)
    return state


@cache
def random_logits(vocab: int, *key: int) -> np.ndarray:
    return np.random.default_rng([part % WORD for part in key]).normal(scale=2.0, size=vocab).astype(np.float32)


@dataclass
class FakeModel:
    """The language model. `agreement` in [0, 1] mixes right and random drafts; `right(anchor, offset)` scripts them."""

    vocab: int = 17
    agreement: float = 0.7
    key: int = 0
    right: Callable[[int, int], bool] | None = None

    @property
    def mask(self) -> int:
        return self.vocab - 1

    def clean(self, prefix: Sequence[int]) -> np.ndarray:
        """Logits [V] of the token after `prefix`."""
        return self.clean_from(prefix_state(prefix))

    def clean_from(self, state: int) -> np.ndarray:
        return random_logits(self.vocab, self.key, state)

    def horizon_from(self, state: int, size: int) -> np.ndarray:
        """Logits [size + 1] of how many drafts are safe after a prefix."""
        return random_logits(size + 1, self.key, state, 77)

    def horizon(self, prefix: Sequence[int], size: int) -> int:
        return int(self.horizon_from(prefix_state(prefix), size).argmax())

    def noisy(self, prefix: Sequence[int], block: Sequence[int], offset: int, readout: str) -> np.ndarray:
        """Logits [V] of noisy row `offset` of a block anchored after `prefix`."""
        return self.noisy_from(prefix_state(prefix), len(prefix), block, offset, readout)

    def noisy_from(self, state: int, anchor: int, block: Sequence[int], offset: int, readout: str) -> np.ndarray:
        visible = list(block) if readout == "block_end" else list(block[: offset + 1])
        guess = state
        for token in visible[: offset + 1]:
            if token == self.mask:
                token = int(self.clean_from(guess)[: self.mask].argmax())
            guess = roll(guess, token)
        likely = self.clean_from(guess)
        if self.right is not None:
            return likely if self.right(anchor, offset) else -likely
        other = random_logits(self.vocab, self.key, state, 1 + READOUTS[readout], offset, *[t + 1 for t in visible])
        return self.agreement * likely + (1 - self.agreement) * other


@dataclass
class Call:
    """What one step was asked: per request, its clean positions and (anchor, ids) of its blocks."""

    clean: list[list[int]]
    blocks: list[list[tuple[int, list[int]]]]
    heads: int


@dataclass
class FakeProgram:
    """A `DecodeProgram` around `FakeModel` that checks everything it is told."""

    model: FakeModel
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    calls: list[Call] = field(default_factory=list)
    horizon: int | None = None
    """Drafts of the largest horizon: the rows of the logits are as wide as those of `HorizonProgram`. None: they have
    none."""

    cache_slots = (
        CacheSlot("tokens", "keys", ("batch", "capacity"), torch.int64),
        CacheSlot("window", "conv", ("batch", 1, WINDOW - 1), torch.int64),
        CacheSlot("hash", "state", ("batch",), torch.int64),
        CacheSlot("count", "state", ("batch",), torch.int64),
        CacheSlot("pending", "pending_k", ("batch", "pending"), torch.int64),
    )

    @property
    def vocab_size(self) -> int:
        return self.model.vocab

    def step(self, input_ids: Tensor, layout: Layout, head_rows: Tensor, cache: Cache) -> Tensor:
        layout.validate()
        assert input_ids.shape == (layout.rows, layout.length) == (cache.batch, layout.length)
        assert not layout.block_document.numel() or set(layout.block_document.unique().tolist()) <= {-1, 0}
        wanted = head_rows.tolist()
        assert len(set(wanted)) == len(wanted)
        call = Call([], [], len(wanted))
        logits: dict[int, np.ndarray] = {}
        hashes, counts, windows = [], [], []
        for row in range(layout.rows):
            prefix = self._commit(row, layout, cache)
            hashes.append(prefix_state(prefix))
            counts.append(len(prefix))
            windows.append(([0] * WINDOW + prefix)[-WINDOW + 1 :])
            self._row(row, prefix, input_ids, layout, cache, logits, call)
        cache.tensors["hash"] = torch.tensor([h - WORD if h >= WORD // 2 else h for h in hashes])
        cache.tensors["count"] = torch.tensor(counts)
        clean = input_ids[:, : layout.clean_length].clone()
        cache.tensors["window"] = torch.cat([torch.tensor(windows), clean], dim=1)[:, None]
        cache.tensors["pending"] = clean
        self.calls.append(call)
        assert set(wanted) <= set(logits), "logits were asked for a padding slot"
        values = np.array([logits[flat] for flat in wanted], dtype=np.float32)
        width = self.vocab_size + (0 if self.horizon is None else self.horizon + 1)
        return torch.from_numpy(values).reshape(len(wanted), width)

    def _wide(self, logits: np.ndarray, state: int) -> np.ndarray:
        if self.horizon is None:
            return logits
        return np.concatenate([logits, self.model.horizon_from(state, self.horizon)])

    def _commit(self, row: int, layout: Layout, cache: Cache) -> list[int]:
        """Apply the accepted pending rows; returns the clean prefix after checking that all caches agree on it."""
        accepted, cached = int(cache.accepted[row]), int(layout.cached[row])
        pending = cache.tensors["pending"][row].tolist()
        assert 0 <= accepted <= len(pending)
        assert int(cache.tensors["count"][row]) + accepted == cached
        assert layout.cached[row] == cache.length[row]
        prefix = cache.tensors["tokens"][row, :cached].tolist()
        state = prefix_state(pending[:accepted], start=int(cache.tensors["hash"][row]) % WORD)
        assert state == prefix_state(prefix), "the recurrent state and the keys disagree"
        window = cache.tensors["window"][row, 0, accepted : accepted + WINDOW - 1].tolist()
        assert window == ([0] * WINDOW + prefix)[-WINDOW + 1 :], "the conv window and the keys disagree"
        return prefix

    def _row(
        self,
        row: int,
        prefix: list[int],
        input_ids: Tensor,
        layout: Layout,
        cache: Cache,
        logits: dict[int, np.ndarray],
        call: Call,
    ) -> None:
        model, base = self.model, row * layout.length
        states = {len(prefix): prefix_state(prefix)}
        clean: list[int] = []
        for slot, position in enumerate(layout.clean_position[row].tolist()):
            if layout.clean_document[row, slot] < 0:
                continue
            token = int(input_ids[row, slot])
            assert 0 <= token < model.mask, "a clean token must be a real token"
            assert position < cache.capacity == cache.tensors["tokens"].shape[1]
            cache.tensors["tokens"][row, position] = token
            states[position + 1] = roll(states[position], token)
            logits[base + slot] = self._wide(model.clean_from(states[position + 1]), states[position + 1])
            clean.append(position)
        blocks = []
        names = {value: name for name, value in READOUTS.items()}
        noisy_block = layout.noisy_block[row].tolist()
        for block in range(layout.blocks):
            slots = [slot for slot, owner in enumerate(noisy_block) if owner == block]
            if not slots:
                assert layout.block_document[row, block] == -1
                continue
            anchor = int(layout.block_anchor[row, block])
            ids = [int(input_ids[row, layout.clean_length + slot]) for slot in slots]
            assert all(0 <= token < model.vocab for token in ids)
            readout = names[int(layout.block_readout[row, block])]
            start = base + layout.clean_length
            for offset, slot in enumerate(slots):
                drafted = model.noisy_from(states[anchor], anchor, ids, offset, readout)
                logits[start + slot] = self._wide(drafted, states[anchor] + 1 + offset)
            blocks.append((anchor, ids))
        call.clean.append(clean)
        call.blocks.append(blocks)
