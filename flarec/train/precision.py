"""What a run computes in: bfloat16 with float32 master weights, or float32.

In bfloat16 the program is that of transformers in bfloat16 (captured in it, so that no casts are baked in): products
and what lies between mixers in bfloat16; gates, states, norms, softmax and losses in float32, as the ops have it.
Parameters that the source stores in float32 stay float32 where the graph computes with them in float32 anyway (decay
rates); all others are bfloat16 and have a float32 master (`Weights`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..checkpoint.directory import Checkpoint
from ..checkpoint.weights import stored_dtypes
from ..ir.program import Program
from .moments import moment_bytes
from .saves import SavedState

Precision = Literal["bf16", "float32"]
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "float32": torch.float32}


def resolve_precision(choice: str, device: torch.device) -> Precision:
    """`auto` is bf16 on a GPU and float32 on a CPU."""
    if choice == "auto":
        return "bf16" if device.type == "cuda" else "float32"
    assert choice in DTYPES, choice
    return choice


def exact_weights(source: Checkpoint, model: Any, device: torch.device) -> dict[str, Tensor]:
    """Float32 values of the parameters that `model`, loaded in bfloat16, holds rounded; by every name they have."""
    named = dict(model.named_parameters(remove_duplicate=False))
    stored = stored_dtypes(source.path, model)
    rounded = {name for name in named if stored[name] not in (torch.bfloat16, named[name].dtype)}
    if not rounded:
        return {}
    whole = source.load_model(torch.float32, device).state_dict()
    return {name: whole[name] for name in rounded}


@torch.no_grad()
def keep_float32(program: Program, exact: Mapping[str, Tensor]) -> list[str]:
    """Give a captured bfloat16 program the exact float32 parameters that it widens before it computes with them.

    Nothing else in the graph changes its dtype by that. Returns their names.
    """
    readings: dict[nn.Parameter, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in exact:
            readings.setdefault(program.module.get_parameter(str(node.target)), []).append(node)
    kept = []
    for parameter, nodes in readings.items():
        if all(map(_is_widened, nodes)):
            parameter.data = exact[str(nodes[0].target)].to(parameter.device)
            for node in nodes:
                node.meta["val"] = replace(node.meta["val"], dtype=torch.float32)
            kept += [str(node.target) for node in nodes]
    return kept


def _is_widened(parameter: fx.Node) -> bool:
    """Whether all that is computed from a parameter is float32: it is cast, or meets float32."""
    readers = [user for user in parameter.users if "_assert" not in str(user.target)]
    for user in readers:
        spec = user.meta.get("val")
        pointwise = isinstance(user.target, torch._ops.OpOverload) and torch.Tag.pointwise in user.target.tags
        if spec is None or spec.dtype != torch.float32 or not (pointwise or user.target is torch.ops.aten.to.dtype):
            return False
    return bool(readers)


class Weights:
    """The trained parameters of a program and their masters, which the optimizer changes.

    parameters  what the graph reads
    masters     by the same names: float32 for a 16-bit parameter, any other parameter itself
    coded       names of those whose moments are codes
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], exact: Mapping[str, Tensor] | None = None,
        coded: frozenset[str] = frozenset(),
    ) -> None:
        self.parameters = dict(parameters)
        self.coded = coded
        for name in coded:  # codes follow the elements as they lie
            self.parameters[name].data = self.parameters[name].data.contiguous()
        self.masters: dict[str, nn.Parameter] = {}
        for name, parameter in self.parameters.items():
            value = (exact or {}).get(name, parameter).detach()
            is_rounded = parameter.dtype.itemsize == 2
            self.masters[name] = nn.Parameter(value.float().contiguous()) if is_rounded else parameter
        pairs = zip(self.parameters.values(), self.masters.values(), strict=True)
        self._rounded = [(parameter, master) for parameter, master in pairs if parameter is not master]
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                self.hook(name, parameter)
        self.round()

    def hook(self, name: str, parameter: nn.Parameter) -> None:
        """Have `arrive` called with the name of a parameter whose gradient is complete. The hook does not keep these
        weights alive, and is silent unless they are at work (`backward`): others may train the program's parameters."""
        reference = weakref.ref(self)

        def arrived(_: Tensor) -> None:
            weights = reference()
            if weights is not None and weights.working:
                weights.arrive(name)

        parameter.register_post_accumulate_grad_hook(arrived)

    frozen: Mapping[str, nn.Parameter] = MappingProxyType({})
    """Parameters that are not trained and are a part of `bytes`."""
    working = False
    """Whether a backward pass of these weights is going on."""

    def backward(self, loss: Tensor) -> None:
        """A backward pass whose gradients are added to those before, and are freed one after the other meanwhile."""
        self.working = True
        try:
            loss.backward()
        finally:
            self.working = False
        self.collect()

    def arrive(self, name: str) -> None:
        """The gradient of a parameter is complete, in a backward pass that goes on."""
        _collect(self.parameters[name], self.masters[name])

    def collect(self) -> None:
        """Add the gradients of a backward pass to those of the masters, in float32, and forget them.

        bfloat16 sums over many micro batches would lose what the later ones add (`benchmarks/precision_curve.py`).
        """
        for parameter, master in self._rounded:
            _collect(parameter, master)

    @property
    def optimized(self) -> list[nn.Parameter]:
        """What the optimizer changes."""
        return list(self.masters.values())

    @property
    def optimized_in_codes(self) -> list[nn.Parameter]:
        """Those of `optimized` whose moments are codes."""
        return [self.masters[name] for name in self.masters if name in self.coded]

    @property
    def moment_bytes(self) -> int:
        """Of AdamW's moments."""
        return sum(moment_bytes(m.numel(), m.dtype, name in self.coded) for name, m in self.masters.items())

    @property
    def kinds(self) -> dict[str, Tensor]:
        """Tensors of the shapes and dtypes of the masters, by name."""
        return dict(self.masters)

    def forget(self) -> None:
        """Drop all gradients."""
        for master in self.masters.values():
            master.grad = None

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients down to a global norm of `limit`; returns the norm before, a scalar on the device."""
        return nn.utils.clip_grad_norm_([master for master in self.optimized if master.grad is not None], limit)

    def saved(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The masters, and what the optimizer keeps of them under NAME.KIND."""
        moments = {
            f"{name}.{kind}": tensor
            for name, master in self.masters.items()
            for kind, tensor in optimizer.state.get(master, {}).items()
        }
        return {name: master.detach() for name, master in self.masters.items()}, moments

    @torch.no_grad()
    def load(self, state: SavedState, optimizer: torch.optim.Optimizer) -> None:
        """Take over what `saved` gave."""
        for name, master in self.masters.items():
            master.copy_(state.model[name])
        self.round()
        for key, tensor in state.optimizer.items():
            name, _, kind = key.rpartition(".")
            optimizer.state[self.masters[name]][kind] = tensor.to(self.masters[name].device, copy=True)

    @torch.no_grad()
    def round(self) -> None:
        """Make the program's parameters what the masters are now."""
        if self._rounded:
            rounded, masters = zip(*self._rounded, strict=True)
            torch._foreach_copy_(rounded, masters)

    def gather(self) -> None:
        """Have all parameters of the program whole (of several ranks on the first), until `release`."""

    def release(self) -> None:
        """What was gathered is not read any more."""

    def widen(self) -> None:
        """Put the masters in the place of the program's parameters, to be written; the program is not run any more."""
        for parameter, master in self._rounded:
            parameter.data = master.data

    @property
    def bytes(self) -> int:
        """Of parameters, masters, gradients and AdamW's two moments."""
        copies = sum(parameter.nbytes for parameter, _ in self._rounded)
        return copies + 2 * sum(master.nbytes for master in self.masters.values()) + self.moment_bytes


@torch.no_grad()
def _collect(parameter: nn.Parameter, master: nn.Parameter) -> None:
    if parameter.grad is None:
        return
    if master.grad is None:
        master.grad = parameter.grad.to(master.dtype)
    else:
        master.grad += parameter.grad
    parameter.grad = None
