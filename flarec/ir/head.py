"""The language-model head of a program whose graph ends at hidden rows (pass `split-head`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Head:
    """What makes logits [N, V] of hidden rows [N, D]: a linear layer, and what its results go through one by one.

    weight  name of the parameter [V, D] in the program; of a tied head it is the embedding's
    bias    name of the parameter [V], None if there is none
    tail    elementwise graph from the linear layer's results to the logits (scaling, soft cap, cast); None: they are
            the logits
    implementation  of the losses of a chunk of rows (`flarec.kernels.row_losses`): "torch", "triton" or "reference"
    """

    weight: str
    bias: str | None = None
    tail: fx.GraphModule | None = None
    implementation: str = "torch"

    def parameters(self, module: fx.GraphModule) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight and bias in the program's module."""
        return module.get_parameter(self.weight), None if self.bias is None else module.get_parameter(self.bias)

    def attach(self, source: fx.GraphModule, module: fx.GraphModule) -> None:
        """Give `module` the parameters of `source`: fx copies only what a graph reads."""
        for name in filter(None, (self.weight, self.bias)):
            path, _, leaf = name.rpartition(".")
            owner: nn.Module = module
            for part in filter(None, path.split(".")):
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, source.get_parameter(name))

    def logits(self, module: fx.GraphModule, hidden: Tensor) -> Tensor:
        """[N, V], all at once and differentiable."""
        weight, bias = self.parameters(module)
        results = F.linear(hidden, weight, bias)
        return results if self.tail is None else self.tail(results)

    def describe(self) -> str:
        """`lm_head.weight`, with the names of what follows the linear layer."""
        if self.tail is None:
            return self.weight
        calls = [node for node in self.tail.graph.nodes if node.op == "call_function"]
        return " -> ".join([self.weight, *(str(node.target).removeprefix("aten.").partition(".")[0] for node in calls)])
