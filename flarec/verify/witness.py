"""How far a model's own float32 is from exact arithmetic on a text: what no other way of computing can be held below.

The witness is the model in transformers once more, in float64. Its classes ask for float32 in places (norms, softmax,
rotary tables); for the witness these are float64 too.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flarec.frontend.export import layers_of

DRAWS = 4
"""Runs with rounding noise beside the model's own run: one run's error says little about the next one's."""


@dataclass(frozen=True)
class Seen:
    """A text in transformers. exact [T, V] float64: its logits; error: the largest distance of float32 logits from
    them, over the model's own run and `DRAWS` with noise; own: of the model's own run, by token [T]; largest: abs of
    the logits."""

    exact: Tensor
    error: float
    own: Tensor
    largest: float


class Witness:
    """A float32 model of transformers and, made when it is asked for, the same in float64."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._exact: Any = None
        self._seen: dict[tuple[int, ...], Seen] = {}

    def see(self, tokens: Sequence[int]) -> Seen:
        """Logits and error on a text; texts that were seen are remembered."""
        key = tuple(tokens)
        if key not in self._seen:
            self._seen[key] = self._measure(torch.tensor([key]))
        return self._seen[key]

    def _measure(self, ids: Tensor) -> Seen:
        if self._exact is None:
            self._exact = copy.deepcopy(self.model).double().eval()
            if self._exact._can_set_experts_implementation():
                self._exact.set_experts_implementation("eager")  # grouped products have no float64
        with torch.no_grad():
            with _Float64():
                exact: Tensor = self._exact(ids).logits[0]
            assert exact.dtype == torch.float64
            own = (self.model(ids).logits[0] - exact).abs().amax(1)
            with _rounding_noise(self.model, seed=int(ids.sum())):
                noisy = (self.model(ids.expand(DRAWS, -1)).logits - exact).abs()
        return Seen(exact, max(float(own.max()), float(noisy.max())), own, float(exact.abs().max()))


class _Float64(TorchFunctionMode):
    """float64 wherever float32 is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        named = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **named)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextlib.contextmanager
def _rounding_noise(model: nn.Module, seed: int) -> Iterator[None]:
    """What every decoder layer gives is off by up to a rounding step, at random."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, given: Any, result: Any) -> Any:
        hidden = result[0] if isinstance(result, tuple) else result
        noise = torch.rand(hidden.shape, generator=generator, dtype=hidden.dtype) * 2 - 1
        hidden = hidden * (1 + torch.finfo(hidden.dtype).eps * noise)
        return (hidden, *result[1:]) if isinstance(result, tuple) else hidden

    layers = layers_of(model)
    assert layers is not None, "capture refuses a model without decoder layers"
    hooks = [layer.register_forward_hook(disturb) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
