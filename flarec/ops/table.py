"""The table of semantic ops, and the way from a node to its row."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from .gated_recurrence import GATED_RECURRENCE
from .generalized_delta_rule import GENERALIZED_DELTA_RULE
from .linear_attention import LINEAR_ATTENTION
from .mixer import Call, Mixer, Site
from .moe_experts import MOE_EXPERTS
from .register import MIXERS
from .selective_scan import SELECTIVE_SCAN
from .short_conv import SHORT_CONV
from .softmax_attention import SOFTMAX_ATTENTION

_MIXERS: dict[object, Mixer] = {}
"""By the op of a captured graph."""


def register(mixer: Mixer) -> Mixer:
    """Enter an op into the table: from then on capture, passes and reports know it. Returns it.

    A name has one row; `ValueError` for a second one.
    """
    if any(known.name == mixer.name for known in _MIXERS.values()):
        raise ValueError(f"the semantic op '{mixer.name}' is declared twice; choose another name")
    _MIXERS[mixer.op] = mixer
    MIXERS[mixer.name] = mixer
    return mixer


for _mixer in (
    SOFTMAX_ATTENTION,
    SHORT_CONV,
    LINEAR_ATTENTION,
    SELECTIVE_SCAN,
    GATED_RECURRENCE,
    GENERALIZED_DELTA_RULE,
    MOE_EXPERTS,
):
    register(_mixer)


def mixers() -> tuple[Mixer, ...]:
    """Every op of the table."""
    return tuple(_MIXERS.values())


def mixer_of(target: object) -> Mixer | None:
    """The op that a node with this target is, at any stage of lowering; None if it is none of the table."""
    return target.mixer if isinstance(target, Call) else _MIXERS.get(target)


def sites(graph: fx.Graph) -> Iterator[tuple[fx.Node, Mixer]]:
    """Every call of an op of the table, in graph order."""
    for node in list(graph.nodes):
        mixer = mixer_of(node.target) if node.op == "call_function" else None
        if mixer is not None:
            yield node, mixer


def site_of(node: fx.Node, chunk_size: int = 64) -> Site:
    """A call as declarations see it: operands by name, tensors as the specs in their metadata."""
    operands = {
        name: value.meta.get("val") if isinstance(value, fx.Node) else value for name, value in node.kwargs.items()
    }
    return Site(operands, isinstance(node.target, Call) and node.target.step, chunk_size)


def name_operands(graph: fx.Graph) -> None:
    """Give the operands of every captured op their names, defaults filled in: what `export` traced has positions."""
    for node, mixer in sites(graph):
        if not isinstance(node.target, Call):
            node.args, node.kwargs = (), mixer.bind(node.args, node.kwargs)
