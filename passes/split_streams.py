"""The clean stream apart from the noisy one, so that a frozen clean stream costs no backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from flarec import ops
from flarec.errors import PropertyError
from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program, locate
from flarec.ir.spec import CLEAN, LENGTH, ROWS
from flarec.layout import Layout
from flarec.ops.streams import clean_stream, join_rows, join_streams, noisy_stream

from .adapt_noisy_stream import VIEWS, NoisyRows
from .canonicalize import STOPS

ATEN = torch.ops.aten
JOINS = (join_streams, join_rows)
PARTS = (clean_stream, noisy_stream)


@dataclass(frozen=True)
class StreamPositions:
    """[rows, Lc] or [rows, Ln] int64: positions inside the document of the tokens of one stream."""

    stream: str

    @property
    def name(self) -> str:
        return f"{self.stream}_position_ids"

    def build(self, layout: Layout, capacity: int | None) -> Tensor:
        return layout.clean_position if self.stream == CLEAN else layout.noisy_position

    def describe(self) -> str:
        return f"positions inside the document, {self.stream}"


@dataclass(frozen=True)
class SplitStreams(Pass):
    """Compute what lies between mixers once for clean and once for noisy tokens; only mixers and the head see both.

    before   %y = linear(%x [rows, T, D], %w)        %z = where(%noisy_rows, add(%y, %adapter), %y)
             %o = two_stream_linear_attention(q=%z, ..., layout=%layout)
    after    %y_clean = linear(%x_clean [rows, Lc, D], %w)
             %y_noisy = linear(%x_noisy [rows, Ln, D], %w)     %z_noisy = add(%y_noisy, %adapter)
             %q = join_streams(%y_clean, %z_noisy, dim)
             %o = two_stream_linear_attention(q=%q, ..., layout=%layout), with a frozen clean stream
             %o_clean = clean_stream(%o, %clean_position_ids, dim)      (without a gradient)
             %o_noisy = noisy_stream(%o, %noisy_position_ids, dim)

    For training over a frozen model (docs/semantics.md section 6): the clean stream holds no adapter and records
    nothing for a backward pass, and gradients come from noisy rows alone.
    """

    name: ClassVar[str] = "split-streams"
    requires: ClassVar[Claims] = frozenset({"noisy-adapted", "masked", "state-scheduled", "narrowed"})
    provides: ClassVar[Claims] = frozenset({"streams-split"})
    targets: ClassVar[frozenset[str]] = frozenset({"train"})

    def apply(self, program: Program) -> list[fx.Node]:
        return _Split(program).run()


Pair = tuple[fx.Node, fx.Node]


class _Split:
    """One run of the pass. `pairs`: what a node of the graph is in the clean and in the noisy stream."""

    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, program.graph
        self.pairs: dict[fx.Node, Pair] = {}
        self.joined: dict[fx.Node, fx.Node] = {}
        self.stopped: dict[fx.Node, fx.Node] = {}
        self.trained = _reached_by_training(program)
        streams = [StreamPositions(stream) for stream in (CLEAN, "noisy")]
        program.derivations |= {item.name: item for item in streams}
        clean, noisy = (program.placeholder(item.name) for item in streams)
        self.positions: Pair = (clean, noisy)

    def run(self) -> list[fx.Node]:
        sites = []
        for node in list(self.graph.nodes):
            if node in self.positions or node.op == "get_attr":
                continue
            if node.op == "placeholder":
                self._input(node)
            elif self._is_meeting(node):
                sites.append(node)
                self._meet(node)
            elif any(source in self.pairs for source in node.all_input_nodes):
                self.pairs[node] = self._copies(node)
        self._remove()
        return sites

    def _input(self, node: fx.Node) -> None:
        """Ids and what a token knows of itself are cut in two, behind the last input; positions are derived apart."""
        if node.name == "position_ids":
            self.pairs[node] = self.positions
        elif node.name == "input_ids" or node.name == NoisyRows.name:
            with self.graph.inserting_after(self.program.placeholders()[-1]):
                self.pairs[node] = self._parts(node, 1)

    def _is_meeting(self, node: fx.Node) -> bool:
        """Mixers, and what reads the tokens of both streams: the head's gather, counts, outputs."""
        mixer = ops.mixer_of(node.target)
        if mixer is not None:
            return mixer.mixing != "none"
        rows = [source.name == "head_rows" for source in node.all_input_nodes]
        return node.op == "output" or node.target is ops.count_experts or any(rows)

    def _meet(self, node: fx.Node) -> None:
        with self.graph.inserting_before(node):
            node.args = fx.node.map_arg(node.args, self._join)
            node.kwargs = fx.node.map_arg(node.kwargs, self._join)
        mixer = ops.mixer_of(node.target)
        if mixer is None:
            return
        assert isinstance(node.target, ops.Call)
        node.target = replace(node.target, frozen_clean=True)
        node.kwargs = node.kwargs | {"clean_positions": self.positions[0]}
        with self.graph.inserting_after(node):
            self.pairs[node] = self._parts(node, mixer.output.index("L"))

    def _parts(self, node: fx.Node, dim: int) -> Pair:
        made = [
            self._like(self.graph.call_function(part, (node, positions, dim)), node)
            for part, positions in zip(PARTS, self.positions, strict=True)
        ]
        return made[0], made[1]

    def _join(self, node: fx.Node) -> fx.Node:
        """Both streams of a node again, made where the first reader is."""
        if node not in self.pairs or (node.op == "placeholder" and node.name != "input_ids"):
            return node
        if node in self.joined:
            return self.joined[node]
        shape, pair = node.meta["val"].shape, self.pairs[node]
        if LENGTH in shape:
            made = self.graph.call_function(join_streams, (*pair, shape.index(LENGTH)))
        else:
            assert shape[0] == f"{LENGTH}*{ROWS}", f"{locate(node)} holds tokens in no dimension of their own"
            made = self.graph.call_function(join_rows, (*pair, self.positions[0]))
        self.joined[node] = self._like(made, node)
        return made

    def _copies(self, node: fx.Node) -> Pair:
        chosen = self._chosen(node)
        if chosen is not None:
            return chosen
        made = []
        for stream in (0, 1):
            with self.graph.inserting_before(node):
                made.append(self._like(self.graph.node_copy(node, self._source(stream)), node))
        return made[0], made[1]

    def _source(self, stream: int) -> Callable[[fx.Node], fx.Node]:
        def source(node: fx.Node) -> fx.Node:
            if node in self.pairs:
                return self.pairs[node][stream]
            return self._without_gradient(node) if stream == 0 and node in self.trained else node

        return source

    def _without_gradient(self, node: fx.Node) -> fx.Node:
        """A trained parameter (the mask vector, which stands for no clean token) as the clean stream reads it."""
        if node not in self.stopped:
            with self.graph.inserting_after(node):
                self.stopped[node] = self._like(self.graph.call_function(ATEN.detach.default, (node,)), node)
        return self.stopped[node]

    def _chosen(self, node: fx.Node) -> Pair | None:
        """A choice by `noisy_rows` is none within a stream."""
        if node.target is not ATEN.where.self:
            return None
        rows, noisy, clean = node.args
        while isinstance(rows, fx.Node) and rows.target in VIEWS:
            rows = rows.args[0]
        if not isinstance(rows, fx.Node) or rows.name != NoisyRows.name or rows.op != "placeholder":
            return None
        assert isinstance(noisy, fx.Node) and isinstance(clean, fx.Node)
        return self.pairs[clean][0], self.pairs[noisy][1]

    def _like(self, new: fx.Node, old: fx.Node) -> fx.Node:
        new.meta = {key: value for key, value in old.meta.items() if key != "val"}
        return new

    def _remove(self) -> None:
        """What was computed for tokens of both streams, and what one of them does not need."""
        for node in reversed(self.pairs):
            if node.op == "call_function" and not node.users:
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code()
        for node in self.program.placeholders():
            if node.name in ("position_ids", NoisyRows.name) and not node.users:
                self.graph.erase_node(node)
                del self.program.derivations[node.name]


def _reached_by_training(program: Program) -> set[fx.Node]:
    """Nodes computed from parameters that are not the model's, before any stop of the gradient."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        own = node.op == "get_attr" and node.target in program.extra
        if own or any(source in found for source in operands_with_gradient(node)):
            found.add(node)
    return found


def operands_with_gradient(node: fx.Node) -> list[fx.Node]:
    """Operands that a node's gradient goes to: none where the graph stops it."""
    if node.target in STOPS or node.target is clean_stream:
        return []
    return [node.args[1]] if node.target in JOINS else node.all_input_nodes  # type: ignore[list-item]


def check_streams_split(program: Program) -> None:
    """Between mixers no node holds tokens of both streams; mixers have a frozen clean stream; and nothing of the clean
    stream is computed from a trained parameter."""
    trained = _reached_by_training(program)
    for node in program.graph.nodes:
        mixer, spec = ops.mixer_of(node.target), node.meta.get("val")
        if mixer is not None and mixer.mixing != "none":
            _check_mixer(node)
            continue
        if node.op == "output" or node.op == "placeholder" or node.target in JOINS or not hasattr(spec, "shape"):
            continue
        names = {name for size in spec.shape if isinstance(size, str) for name in size.split("*")}
        joined = [source for source in node.all_input_nodes if source.target in JOINS]
        if LENGTH in names and not (joined and all("head_rows" in _names(user) for user in node.users)):
            raise PropertyError(f"{locate(node)} holds tokens of both streams")
        if CLEAN in names and node in trained:
            raise PropertyError(f"{locate(node)} computes clean tokens from a trained parameter")


def _names(node: fx.Node) -> set[str]:
    return {source.name for source in node.all_input_nodes}


def _check_mixer(node: fx.Node) -> None:
    assert isinstance(node.target, ops.Call)
    if not node.target.frozen_clean:
        raise PropertyError(f"{locate(node)} computes gradients of its clean stream")
    for user in node.users:
        if user.target not in PARTS:
            raise PropertyError(f"{locate(user)} reads both streams of a mixer")
