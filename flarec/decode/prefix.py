"""Prefixes that were read before: keys, values and states of prompts, at page boundaries and at the prompts' ends.

A tree of pages per program. A page holds the keys and values of its positions, and maybe the states behind its last
one; an end holds those of the tokens behind the last page, the states behind it, and the logits that a start needs. A
prompt continues behind the longest prefix with states that is found. Models of softmax attention alone have no states:
they continue behind every page.

States are at hand between the forwards of a prompt and nowhere else: the next forward commits them first (`Cache`).
Prompts are read in pieces as large as without a prefix cache, so that states are kept behind pieces and at ends. A
prompt that follows known pages further than any state (it diverges inside of a piece, or inside of a prompt that was
read at once) ends a piece there, at the *branch*, and leaves states: what prompts share is a hit from the third one on.

What is found was computed from the same tokens, in other pieces than those of a prompt that is read anew. In float32
that is rounding in the last places; in bfloat16 a text may take another one of two nearly equal choices, as it may
beside other requests, where pieces are others, too. A prompt that is known whole starts from the logits that it gave.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flarec.base.flat import sent
from flarec.ir.slots import CacheSlot

from .cache import Cache, widened

PAGE = 256
"""Tokens. Smaller pages find more, and are more copies."""


@dataclass(eq=False)
class PrefixNode:
    """A page, or an end, which has no children.

    tokens   of its positions; start is the first of them
    tensors  slot -> keys and values of these positions, of one request
    states   slot -> the whole of the others, behind the last position; None: not kept
    pending  clean rows in the states that the next step commits before it works (0 for a page)
    logits   of an end: what a start is given, by mode (`Prefill`)
    """

    parent: PrefixNode | None
    tokens: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]
    states: dict[str, Tensor] | None = None
    pending: int = 0
    logits: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict)
    pages: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)
    ends: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes."""
        logits = [tensor for pair in self.logits.values() for tensor in pair]
        return _bytes([*self.tensors.values(), *(self.states or {}).values(), *logits])

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
    """What is known of a prompt, kept while it is held.

    nodes   cover its first `length` tokens
    states  behind the last node
    logits  are there if the nodes cover all of it
    branch  tokens up to which pages are known, if these are more: a piece that ends there leaves states; otherwise 0
    """

    nodes: tuple[PrefixNode, ...] = ()
    states: dict[str, Tensor] = field(default_factory=dict)
    logits: tuple[Tensor, Tensor] | None = None
    branch: int = 0

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
            node, best = self._root(program), None
            while True:
                best = self._end(node, prompt, mode) or best
                following = node.pages.get(tuple(prompt[node.end : node.end + self.page]))
                if following is None or following.end >= len(prompt):
                    break
                node = following
                # not behind an end that is this page
                if node.states is not None and (best is None or best.end < node.end):
                    best = node
            self._touch(node)
            branch = 0 if best is not None and best.end >= node.end else node.end
            if best is None:
                return Prefix(branch=branch)
            self._touch(best)
            assert best.states is not None
            logits = best.logits.get(mode) if best.end == len(prompt) else None
            return Prefix(tuple(best.path()), best.states, logits, branch)

    def _end(self, node: PrefixNode, prompt: Sequence[int], mode: Hashable) -> PrefixNode | None:
        """The longest end behind a page that the prompt goes through."""
        for length in sorted({len(tokens) for tokens in node.ends}, reverse=True):
            known = node.ends.get(tuple(prompt[node.end : node.end + length]))
            if known is not None and (known.end < len(prompt) or (known.end == len(prompt) and mode in known.logits)):
                return known
        return None

    def add_page(
        self, program: object, prompt: Sequence[int], end: int, cache: Cache, row: int, *, states: bool = True,
        behind: PrefixNode | None = None,
    ) -> PrefixNode | None:
        """Keep the page that ends there, whose positions the cache has read. states: also those behind it, because the
        cache has just run the forward that begins there. behind: the page before it, where the caller has it, so that
        nobody has to look for it. Returns the page; None if it is not kept."""
        with self._lock:
            if behind is not None and behind in self._used:  # nobody dropped it meanwhile
                parent: PrefixNode | None = behind
            else:
                parent = self._parent(program, prompt, end - self.page)
            if parent is None:
                return None
            tokens = tuple(prompt[end - self.page : end])
            node = parent.pages.get(tokens)
            if node is None:
                node = PrefixNode(parent, tokens, end - self.page, _positions(cache, row, end - self.page, end))
                node.states = None if cache.has_states else {}
                if not self._keep(node):
                    return None
                parent.pages[tokens] = node
            if states and node.states is None:
                node.states = _states(cache, row, 0)
                if not self._keep(node):
                    node.states = None
            return node

    def add_end(
        self, program: object, prompt: Sequence[int], cache: Cache, row: int, pending: int, mode: Hashable,
        logits: tuple[Tensor, Tensor],
    ) -> None:
        """Keep the end of a prompt. The cache has run its last forward, which left `pending` clean rows, or with 0 also
        the step behind it, which committed them. An end that is known stays where the one with these logits, too, does
        not fit."""
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
                parent, tokens, start, _positions(cache, row, start, len(prompt)), _states(cache, row, pending),
                pending, {**others, **kept},
            )
            if not self._keep(node, before=True):
                if known is None:
                    return
                node = known
                self._count(node)
                self._touch(node)
            parent.ends[tokens] = node

    def _root(self, program: object) -> PrefixNode:
        return self._roots.setdefault(id(program), (program, PrefixNode(None, (), 0, {})))[1]

    def _parent(self, program: object, prompt: Sequence[int], end: int) -> PrefixNode | None:
        """The page that ends there (the root for 0), if it is still known."""
        node: PrefixNode | None = self._root(program)
        while node is not None and node.end < end:
            node = node.pages.get(tuple(prompt[node.end : node.end + self.page]))
        return node

    def _keep(self, node: PrefixNode, *, before: bool = False) -> bool:
        """Count a node that is new or has grown, and make room. False if it does not fit beside what leads to it, of
        which `before` gives up states for it, the last ones first."""
        leading = node.path()[:-1]
        room = self.limit - node.size - sum(self._used[item] for item in leading)
        given_up = []
        for page in reversed(leading) if before else ():
            if room < 0 and page.states:
                given_up.append(page)
                room += _bytes(page.states.values())
        if room < 0:
            return False
        for page in given_up:
            page.states = None
            self._count(page)
        self._count(node)
        self._touch(node)
        while self.bytes > self.limit:
            self._drop(next(iter(self._used)))
            self.evicted += 1
        return True

    def _count(self, node: PrefixNode) -> None:
        size = node.size
        self.bytes += size - self._used.get(node, 0)
        self._used[node] = size

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


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _positions(cache: Cache, row: int, start: int, end: int) -> dict[str, Tensor]:
    """Copies of one request's keys and values at [start, end)."""
    return {
        slot.name: _own(slot, cache.tensors[slot.name].narrow(slot.shape.index("capacity"), start, end - start), row)
        for slot in cache.slots if slot.in_place
    }


def _states(cache: Cache, row: int, pending: int) -> dict[str, Tensor]:
    """Copies of one request's other tensors, with `pending` pending rows."""
    found = {}
    for slot in cache.slots:
        tensor, axis = cache.tensors[slot.name], slot.pending_dim()
        if slot.in_place:
            continue
        if axis is not None:
            width = slot.shape[axis]
            tensor = tensor.narrow(axis, 0, pending + (width if isinstance(width, int) else 0))
        found[slot.name] = _own(slot, tensor, row)
    return found


def _own(slot: CacheSlot, tensor: Tensor, row: int) -> Tensor:
    return tensor.narrow(slot.batch_dim(), row, 1).clone(memory_format=torch.contiguous_format)


def restore(cache: Cache, prefixes: Sequence[Prefix]) -> None:
    """Fill an empty cache with requests that have read these prefixes, one per request."""
    for slot in cache.slots:
        axis = slot.pending_dim()
        if axis is not None:
            width = max((prefix.states[slot.name].shape[axis] for prefix in prefixes if prefix.nodes), default=0)
            cache.tensors[slot.name] = widened(cache.tensors[slot.name], axis, width)
        for row, prefix in enumerate(prefixes):
            own = cache.tensors[slot.name].narrow(slot.batch_dim(), row, 1)
            for place, part in _places(slot, own, prefix):
                place.copy_(part)
    device = cache.length.device
    cache.accepted, cache.length = (
        sent(torch.tensor(numbers, dtype=torch.int64), device)
        for numbers in ([prefix.pending for prefix in prefixes], [prefix.length for prefix in prefixes])
    )


def _places(slot: CacheSlot, own: Tensor, prefix: Prefix) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of one request's tensor, with what belongs there."""
    axis = slot.pending_dim()
    if slot.in_place:
        for node in prefix.nodes:
            yield own.narrow(slot.shape.index("capacity"), node.start, len(node.tokens)), node.tensors[slot.name]
    elif prefix.nodes:
        part = prefix.states[slot.name]
        yield own if axis is None else own.narrow(axis, 0, part.shape[axis]), part
