"""Prefixes that were read before: keys, values and states of prompts, at page boundaries and at the prompts' ends.

A tree of pages per program. A page holds the keys and values of its positions and the states behind its last one; an
end holds those of the tokens behind the last page, what the decoder left pending there, and the logits that a start
needs. A prompt continues behind the longest prefix that is found. With a prefix cache prompts are read page by page, so
that the pieces are those of a prompt that is read anew; but behind an end the next piece begins inside a page, which
may round differently, also for those that find that page later.

States behind a page are at hand for nothing: the forward that reads the next page commits them first (`Cache`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flarec.base.flat import sent
from flarec.ir.slots import CacheSlot

from .cache import Cache, widened

PAGE = 256
"""Tokens. Smaller pages find more and keep more states."""


@dataclass(eq=False)
class PrefixNode:
    """A page, or an end, which has no children.

    tokens   of its positions; start is the first of them
    tensors  slot -> its part of one request: positions of keys and values, the whole of the others
    pending  clean rows that the next step commits before it works (0 for a page)
    logits   of an end: what a start is given, by mode (`Prefill`)
    """

    parent: PrefixNode | None
    tokens: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]
    pending: int = 0
    logits: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict)
    pages: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)
    ends: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes."""
        kept = [*self.tensors.values(), *(tensor for pair in self.logits.values() for tensor in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def path(self) -> list[PrefixNode]:
        """From the first page to this node; the root is no page."""
        nodes: list[PrefixNode] = []
        node: PrefixNode | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


@dataclass(frozen=True)
class Prefix:
    """What is known of a prompt. nodes cover its first `length` tokens; logits are there if they cover all of it."""

    nodes: tuple[PrefixNode, ...] = ()
    logits: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        return self.nodes[-1].end if self.nodes else 0

    @property
    def pending(self) -> int:
        return self.nodes[-1].pending if self.nodes else 0


class PrefixCache:
    """Prefixes within a number of bytes; the least recently used go first. Threads may share it.

    limit  bytes of tensors; page  tokens per page. Programs are told apart as objects, and kept.
    """

    def __init__(self, limit: int, page: int = PAGE) -> None:
        self.limit = limit
        self.page = page
        self.bytes = 0
        self.evicted = 0
        self._roots: dict[int, tuple[object, PrefixNode]] = {}  # by id, which is the object's alone while it is kept
        self._used: OrderedDict[PrefixNode, int] = OrderedDict()  # node -> bytes; those used last stand last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._used)

    def find(self, program: object, prompt: Sequence[int], mode: Hashable) -> Prefix:
        """The longest known prefix of a prompt of which at least one token is left to read, or all of it with the
        logits that `mode` starts from."""
        with self._lock:
            node, best = self._root(program), Prefix()
            while True:
                best = max(best, self._ends(node, prompt, mode), key=lambda prefix: prefix.length)
                following = node.pages.get(tuple(prompt[node.end : node.end + self.page]))
                if following is None or following.end >= len(prompt):
                    break
                node = following
                best = max(best, Prefix(tuple(node.path())), key=lambda prefix: prefix.length)
            if best.nodes:
                self._touch(best.nodes[-1])
            return best

    def _ends(self, node: PrefixNode, prompt: Sequence[int], mode: Hashable) -> Prefix:
        """The longest end behind a page that the prompt goes through."""
        for length in sorted({len(tokens) for tokens in node.ends}, reverse=True):
            known = node.ends.get(tuple(prompt[node.end : node.end + length]))
            if known is None or known.end > len(prompt):
                continue
            logits = known.logits.get(mode)
            if known.end < len(prompt) or logits is not None:
                return Prefix(tuple(known.path()), logits if known.end == len(prompt) else None)
        return Prefix()

    def add_page(self, program: object, prompt: Sequence[int], end: int, cache: Cache, row: int) -> None:
        """Keep the page that ends there. The cache has just run the forward that follows it."""
        with self._lock:
            parent = self._parent(program, prompt, end - self.page)
            tokens = tuple(prompt[end - self.page : end])
            if parent is None or tokens in parent.pages:
                return
            node = PrefixNode(parent, tokens, end - self.page, _part(cache, row, end - self.page, end, 0))
            if self._keep(node):
                parent.pages[tokens] = node

    def add_end(
        self, program: object, prompt: Sequence[int], cache: Cache, row: int, pending: int, mode: Hashable,
        logits: tuple[Tensor, Tensor],
    ) -> None:
        """Keep the end of a prompt. The cache has run its last forward, of `pending` clean rows."""
        with self._lock:
            start = (len(prompt) - 1) // self.page * self.page
            parent = self._parent(program, prompt, start)
            tokens = tuple(prompt[start:])
            if parent is None:
                return
            known = parent.ends.pop(tokens, None)
            others = known.logits if known is not None else {}
            if known is not None:
                self._drop(known)
            kept = {mode: (logits[0].clone(), logits[1].clone())}
            node = PrefixNode(
                parent, tokens, start, _part(cache, row, start, len(prompt), pending), pending, {**others, **kept}
            )
            if self._keep(node):
                parent.ends[tokens] = node

    def _root(self, program: object) -> PrefixNode:
        return self._roots.setdefault(id(program), (program, PrefixNode(None, (), 0, {})))[1]

    def _parent(self, program: object, prompt: Sequence[int], end: int) -> PrefixNode | None:
        """The page that ends there (the root for 0), if it is still known."""
        node: PrefixNode | None = self._root(program)
        while node is not None and node.end < end:
            node = node.pages.get(tuple(prompt[node.end : node.end + self.page]))
        return node

    def _keep(self, node: PrefixNode) -> bool:
        """Count a new node in and make room. False if it does not fit by itself."""
        size = node.size
        if size > self.limit:
            return False
        self._used[node] = size
        self.bytes += size
        self._touch(node)
        while self.bytes > self.limit:
            oldest = next(iter(self._used))
            if oldest in node.path():  # what leads to the new node alone fills the limit
                self._drop(node)
                return False
            self._drop(oldest)
            self.evicted += 1
        return True

    def _touch(self, node: PrefixNode) -> None:
        """Used now, and what leads to it after it: the oldest node never leads to another one."""
        for item in reversed(node.path()):
            if item in self._used:
                self._used.move_to_end(item)

    def _drop(self, node: PrefixNode) -> None:
        self.bytes -= self._used.pop(node)
        assert node.parent is not None
        for children in (node.parent.pages, node.parent.ends):
            if children.get(node.tokens) is node:
                del children[node.tokens]


def _part(cache: Cache, row: int, start: int, end: int, pending: int) -> dict[str, Tensor]:
    """Copies of one request's tensors: positions [start, end) of keys and values, `pending` pending rows."""
    return {
        slot.name: tensor.narrow(slot.batch_dim(), row, 1).clone(memory_format=torch.contiguous_format)
        for slot, tensor in _narrowed(cache, start, end, pending)
    }


def _narrowed(cache: Cache, start: int, end: int, pending: int) -> Iterator[tuple[CacheSlot, Tensor]]:
    for slot in cache.slots:
        tensor, axis = cache.tensors[slot.name], slot.pending_dim()
        if slot.in_place:
            tensor = tensor.narrow(slot.shape.index("capacity"), start, end - start)
        elif axis is not None:
            width = slot.shape[axis]
            tensor = tensor.narrow(axis, 0, pending + (width if isinstance(width, int) else 0))
        yield slot, tensor


def restore(cache: Cache, prefixes: Sequence[Prefix]) -> None:
    """Fill an empty cache with requests that have read these prefixes, one per request."""
    for slot in cache.slots:
        axis, ends = slot.pending_dim(), [prefix.nodes[-1:] for prefix in prefixes]
        if axis is not None:
            width = max((node.tensors[slot.name].shape[axis] for end in ends for node in end), default=0)
            cache.tensors[slot.name] = widened(cache.tensors[slot.name], axis, width)
        for row, prefix in enumerate(prefixes):
            own = cache.tensors[slot.name].narrow(slot.batch_dim(), row, 1)
            for node in prefix.nodes if slot.in_place else ends[row]:
                part = node.tensors[slot.name]
                if slot.in_place:
                    place = own.narrow(slot.shape.index("capacity"), node.start, len(node.tokens))
                else:
                    place = own if axis is None else own.narrow(axis, 0, part.shape[axis])
                place.copy_(part)
    device = cache.length.device
    cache.accepted, cache.length = (
        sent(torch.tensor(numbers, dtype=torch.int64), device)
        for numbers in ([prefix.pending for prefix in prefixes], [prefix.length for prefix in prefixes])
    )
