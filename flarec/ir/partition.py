"""What the compiler of regions keeps for a backward pass, without compiling: a region's two halves.

`torch.compile` traces a region forward and backward as one graph and cuts it where least has to be kept (the min-cut
partitioner of AOT autograd, behind inductor's decompositions and passes over that graph). The same is done here, and
the halves are run as they are: autograd then keeps what it keeps in a compiled run, at the cost of a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from .compiled import Code, Codes
from .module import compile_now


@dataclass(frozen=True)
class Halves:
    """A region for operands of one kind.

    forward   [results, then what is kept], of the operands that are tensors
    backward  gradients of these operands, None where there is none; of what is kept and of the results' gradients
    results   how they are put together; learning: the places of those that have a gradient
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    results: TreeSpec
    learning: tuple[int, ...]

    @property
    def kept(self) -> list[fx.Node]:
        """Nodes of `forward` that `backward` reads."""
        return outputs_of(self.forward)[self.results.num_leaves :]

    def sources(self) -> list[tuple[bool, int]]:
        """Of each input of `backward`: whether it is kept, and its place there, else among the learning results."""
        places = {node.name: index for index, node in enumerate(self.kept)}
        found, tangents = [], 0
        for node in self.backward.graph.nodes:
            if node.op == "placeholder" and node.name in places:
                found.append((True, places[node.name]))
            elif node.op == "placeholder":
                found.append((False, tangents))
                tangents += 1
        return found


def outputs_of(module: fx.GraphModule) -> list[Any]:
    (node,) = module.graph.find_nodes(op="output")
    found: Any = node.args[0]
    return list(found) if isinstance(found, (tuple, list)) else [found]


def halves_of(module: fx.GraphModule, operands: Sequence[Any]) -> Halves | None:
    """The halves of a region for such operands; None for one that a gradient does not pass, whose results share memory
    with its operands or one another, or that cannot be traced."""
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    parts: list[tuple[fx.GraphModule, fx.GraphModule, int]] = []

    def partition(joint: fx.GraphModule, inputs: Sequence[object], **more: Any) -> tuple[Any, Any]:
        forward, backward = min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **more)
        parts.append((forward, backward, int(more["num_fwd_outputs"])))
        return forward, backward

    def unchanged(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return make_boxed_func(gm.forward)

    values, structure = tree_flatten(list(operands))

    def call(tensors: Sequence[Tensor]) -> Any:
        given = iter(tensors)
        leaves = [next(given) if isinstance(value, Tensor) else value for value in values]
        return module.forward(*tree_unflatten(leaves, structure))

    def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(call(tensors)))

    with _disable_current_modes(), disable_proxy_modes_tracing(), torch.enable_grad(), FakeTensorMode():
        fakes = [
            torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device
            ).requires_grad_(value.requires_grad)
            for value in values if isinstance(value, Tensor)
        ]
        wanted, results = tree_flatten(call(fakes))
        learning = tuple(index for index, value in enumerate(wanted) if value.requires_grad)
        if not learning:
            return None
        try:
            aot_function(
                of_tensors, unchanged, unchanged, partition_fn=partition, decompositions=select_decomp_table()
            )(*fakes)
        except Exception:  # what cannot be traced is not compiled either (`Code` says so), and keeps what it keeps
            return None
    if not parts or parts[0][2] != len(wanted):
        return None
    forward, backward, _ = parts[0]
    halves = Halves(forward, backward, results, learning)
    tangents = sum(not kept for kept, _ in halves.sources())
    inputs = len(forward.graph.find_nodes(op="placeholder"))
    return halves if (tangents, inputs) == (len(learning), len(fakes)) else None


class _Run(torch.autograd.Function):
    """The results of a region, by its halves. what: computes a half of given values."""

    @staticmethod
    def forward(ctx: Any, halves: Halves, what: Callable[..., list[Any]], *tensors: Tensor) -> tuple[Tensor, ...]:
        found = what(halves.forward, tensors)
        results, kept = found[: halves.results.num_leaves], found[halves.results.num_leaves :]
        ctx.halves, ctx.what = halves, what
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(*(x for i, x in enumerate(results) if i not in halves.learning))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        kept, halves = ctx.saved_tensors, ctx.halves
        learning = [gradients[place] for place in halves.learning]
        given = [kept[place] if is_kept else learning[place] for is_kept, place in halves.sources()]
        return None, None, *ctx.what(halves.backward, given)


def computed(half: fx.GraphModule, values: Sequence[Any]) -> list[Any]:
    """What a half gives."""
    return list(half(*values))


class PartitionedCode(Code):
    """What equal regions run, by halves. what: as `_Run`."""

    def __init__(self, module: fx.GraphModule, what: Callable[..., list[Any]]) -> None:
        compile_now(module)
        self.module, self.what = module, what
        self.known: dict[object, Halves | None] = {}

    def __call__(self, *operands: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            values = tree_leaves(operands)
            kinds = tuple(
                (x.shape, x.stride(), x.dtype, x.requires_grad) if isinstance(x, Tensor) else x for x in values
            )
            if kinds not in self.known:
                self.known[kinds] = halves_of(self.module, operands)
            halves = self.known[kinds]
            if halves is not None:
                tensors = [x for x in values if isinstance(x, Tensor)]
                leaves = _Run.apply(halves, self.what, *tensors)  # type: ignore[no-untyped-call]
                found: tuple[Tensor, ...] = tree_unflatten(list(leaves), halves.results)
                return found
        plain: tuple[Tensor, ...] = self.module(*operands)
        return plain


class PartitionedCodes(Codes):
    """Codes that keep what compiled ones keep. what: computes a half of given values, by default as it is."""

    def __init__(self, what: Callable[..., list[Any]] = computed) -> None:
        super().__init__()
        self.what = what

    def code(self, module: fx.GraphModule, say: Callable[[str], None]) -> Code:
        return PartitionedCode(module, self.what)
