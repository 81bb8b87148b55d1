"""A learned vector for the mask token, for models without a spare vocabulary row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program

ATEN = torch.ops.aten
PARAMETER = "flarec_mask_vector"


@dataclass(frozen=True)
class EmbedMask(Pass):
    """Embed the id `vocab_size` as a parameter of its own. Options: `vector` False leaves the graph alone (spare row).

    before   %e = embedding(%weight, %input_ids)
    after    %e = where(unsqueeze(%input_ids == vocab_size, -1), %mask_vector, embedding(%weight, clamp(%input_ids)))
    """

    vector: bool = False

    name: ClassVar[str] = "embed-mask"
    requires: ClassVar[Claims] = frozenset({"two-stream"})
    provides: ClassVar[Claims] = frozenset({"mask-embedded"})
    may_be_empty: ClassVar[bool] = True  # nothing to do when the mask token is a spare row

    def apply(self, program: Program) -> list[fx.Node]:
        if not self.vector:
            return []
        ids = program.placeholder("input_ids")
        graph, module = program.graph, program.module
        sites = []
        for node in program.calls(ATEN.embedding.default):
            if node.args[1] is not ids:
                continue
            weight = module.get_parameter(str(node.args[0].target))  # type: ignore[union-attr]
            if PARAMETER not in program.extra:
                program.extra[PARAMETER] = nn.Parameter(weight.detach().float().mean(0).to(weight.dtype))
            module.register_parameter(PARAMETER, program.extra[PARAMETER])
            size = weight.shape[0]
            with graph.inserting_before(node):
                is_mask = graph.call_function(ATEN.eq.Scalar, (ids, size))
                column = graph.call_function(ATEN.unsqueeze.default, (is_mask, -1))
                vector = graph.get_attr(PARAMETER)
                clamped = graph.call_function(ATEN.clamp.default, (ids, None, size - 1))
            node.replace_input_with(ids, clamped)
            with graph.inserting_after(node):
                chosen = graph.call_function(ATEN.where.self, (column, vector, node))
            chosen.meta = dict(node.meta)
            for user in list(node.users):
                if user is not chosen:
                    user.replace_input_with(node, chosen)
            for made in (is_mask, column, clamped):
                made.meta = {key: value for key, value in node.meta.items() if key != "val"}
            sites.append(chosen)
        if not sites:
            raise self.fail(ids, "is not embedded by an embedding table", "this model needs a spare vocabulary row")
        return sites
