"""A complete plugin in one file: the pass `cap-logits`, its property with a checker.

    flarec inspect MODEL --plugin examples/plugin/cap_logits.py --pass 'cap-logits(limit=30.0)' --diff
    flarec convert MODEL --data DATA --plugin examples/plugin/cap_logits.py --pass 'cap-logits(limit=30.0)'

A converted checkpoint then decodes with the pass: its manifest holds it, and opening it asks for this plugin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from flarec.plugin import Claims, Pass, Program, Property, PropertyError, locate

ATEN = torch.ops.aten


def _is_capped(program: Program) -> None:
    """The logits are a product with a hyperbolic tangent, looked up from the end without the pass's help.

    In training `split-head` takes the head out of the graph, and what stands behind it with it (`Program.head`).
    """
    if program.head is None:
        logits = program.output_node().args[0][0]
    elif program.head.tail is None:
        raise PropertyError("nothing stands behind the head")
    else:
        (logits,) = program.head.tail.graph.output_node().args
    inner = logits.args[0]
    if logits.target is not ATEN.mul.Scalar or inner.target is not ATEN.tanh.default:
        raise PropertyError(f"{locate(logits)} gives the logits, and it is no limit * tanh(...)")


LOGITS_CAPPED = Property("logits-capped", _is_capped)


@dataclass(frozen=True)
class CapLogits(Pass):
    """Keep every logit between -limit and limit, smoothly.

    before   %logits = linear(%hidden, %lm_head)
    after    %logits = mul(tanh(div(linear(%hidden, %lm_head), limit)), limit)
    """

    limit: float = 30.0

    name: ClassVar[str] = "cap-logits"
    requires: ClassVar[Claims] = frozenset({"narrowed", "logits"})
    provides: ClassVar[Claims] = frozenset({LOGITS_CAPPED})

    def apply(self, program: Program) -> list[fx.Node]:
        output = program.output_node()
        logits = output.args[0][0]
        if not self.limit > 0:
            raise self.fail(logits, f"limit {self.limit} is not above 0", "give a positive limit")
        with program.graph.inserting_before(output):
            small = program.graph.call_function(ATEN.div.Scalar, (logits, self.limit))
            bent = program.graph.call_function(ATEN.tanh.default, (small,))
            capped = program.graph.call_function(ATEN.mul.Scalar, (bent, self.limit))
        output.args = ((capped, *output.args[0][1:]),)
        return [capped]
