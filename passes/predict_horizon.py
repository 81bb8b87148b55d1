"""A small head beside the language-model head: how many drafts of the block behind a clean row are safe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import fx, nn

from flarec.errors import PassError, PropertyError
from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program, locate
from flarec.ir.slots import HORIZON

from .adapt_noisy_stream import register
from .narrow_head import find_head

ATEN = torch.ops.aten
PARAMETERS = ("horizon.0.weight", "horizon.0.bias", "horizon.2.weight", "horizon.2.bias")
"""[width, D], [width], [positions + 1, width], [positions + 1]: of two linear layers with a SiLU between them."""


@dataclass(frozen=True)
class PredictHorizon(Pass):
    """Compute the horizon of every row of the head from its last hidden state (docs/semantics.md section 4).

    before   %rows = index_select(%flat, 0, %head_rows [N])     %logits = linear(%rows [N, D], %lm_head)
    after    %horizon = linear(silu(linear(%rows, horizon.0)), horizon.2)         return %logits, ..., %horizon

    positions: of a block; width: of the inner layer. `Program.extra` holds the parameters (`PARAMETERS`); those that
    are not there are zeros, which say nothing.
    """

    positions: int = 4
    width: int = 256

    name: ClassVar[str] = "predict-horizon"
    requires: ClassVar[Claims] = frozenset({"narrowed", "logits"})
    provides: ClassVar[Claims] = frozenset({"horizon-predicted"})
    targets: ClassVar[frozenset[str]] = frozenset({"decode"})

    def text(self) -> str:
        """With every option: the text of a checkpoint must mean the same under other defaults."""
        return f"{self.name}({', '.join(f'{item.name}={getattr(self, item.name)!r}' for item in fields(self))})"

    def shapes(self, features: int) -> dict[str, tuple[int, ...]]:
        """Of `PARAMETERS`, over hidden rows of so many features."""
        choices = self.positions + 1
        return dict(zip(PARAMETERS, [(self.width, features), (self.width,), (choices, self.width), (choices,)],
                        strict=True))

    def apply(self, program: Program) -> list[fx.Node]:
        head = find_head(program)
        if head is None:
            return []
        rows, weight = head.args[:2]
        assert isinstance(rows, fx.Node) and isinstance(weight, fx.Node)
        graph, call = program.graph, program.graph.call_function
        for name, shape in self.shapes(int(rows.meta["val"].size(-1))).items():
            given = program.extra.setdefault(name, nn.Parameter(torch.zeros(shape, dtype=program.dtype)))
            if given.shape != shape:
                raise PassError(
                    f"pass '{self.name}': '{name}' is {list(given.shape)}, and this program takes {list(shape)}; train "
                    "the head for this checkpoint (flarec train-head)"
                )
            register(program.module, name, given)
        with graph.inserting_before(head):
            first, second = ([graph.get_attr(name) for name in pair] for pair in (PARAMETERS[:2], PARAMETERS[2:]))
            inner = call(ATEN.linear.default, (rows, *first))
            bent = call(ATEN.silu.default, (inner,))
            result = call(ATEN.linear.default, (bent, *second))
        for node in (inner, bent, result):
            node.meta = {key: value for key, value in head.meta.items() if key != "val"}
        program.add_outputs([(HORIZON, result)])
        return [result]


def check_horizon_predicted(program: Program) -> None:
    """The graph returns a horizon for the rows of its logits, and computes it with the parameters of the head."""
    if HORIZON not in program.outputs:
        raise PropertyError(f"the graph has no output '{HORIZON}'")
    node = program.output_node().args[0][program.outputs.index(HORIZON)]  # type: ignore[index]
    assert isinstance(node, fx.Node)
    read, rows = set[str](), node
    while isinstance(rows, fx.Node) and rows.target in (ATEN.linear.default, ATEN.silu.default):
        read |= {str(operand.target) for operand in rows.args[1:] if isinstance(operand, fx.Node)}
        rows = rows.args[0]  # type: ignore[assignment]
    head = find_head(program)
    if head is None or rows is not head.args[0]:
        raise PropertyError(f"{locate(node)} is not computed from the rows of the logits")
    if read != {*PARAMETERS}:
        raise PropertyError(f"{locate(node)} reads {sorted(read)} instead of the head's parameters")
