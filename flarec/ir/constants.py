"""Tensors that a decode graph reads instead of computing or reading several parameters: made once, kept up to date.

They are buffers of the program's module that no state dict holds. What they are made of stays where it is, under its
Hugging Face name: a folded constant is computed from parameters, merged weights are one buffer whose parts the
parameters are views of, so that they take no memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ..errors import PassError


@dataclass
class Constants:
    """What the buffers of a program are made of; clones of a program share it, as they share the buffers.

    sources   the parameters and buffers by name; they are the Hugging Face model's own
    folded    graph of the folded constants, without inputs: a tuple in the order of `names`
    merged    buffer -> the parameters that are its rows, in order
    buffers   the buffers by name
    """

    sources: dict[str, Tensor] = field(default_factory=dict)
    folded: fx.GraphModule | None = None
    names: tuple[str, ...] = ()
    merged: dict[str, tuple[str, ...]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    _stamp: tuple[tuple[int, int], ...] = ()

    @torch.no_grad()
    def merge(self, module: nn.Module, name: str, sources: Mapping[str, nn.Parameter]) -> None:
        """Make one buffer of parameters [rows, ...], and views of it of the parameters."""
        self.sources |= sources
        self.merged[name] = tuple(sources)
        self._keep(module, name, torch.cat([parameter.detach() for parameter in sources.values()]))
        self._share(name)

    @torch.no_grad()
    def fold(
        self, module: nn.Module, folded: fx.GraphModule, names: tuple[str, ...], sources: Mapping[str, Tensor]
    ) -> None:
        """Compute the constants of a graph, of which there is one per program."""
        if self.folded is not None:
            raise PassError("constants are folded already; run the pass 'fold-constants' once")
        self.sources |= sources
        self.folded, self.names = folded, names
        for name, value in zip(names, folded(), strict=True):
            self._keep(module, name, value.detach().contiguous().clone())
        self._stamp = self._now()

    @torch.no_grad()
    def refresh(self) -> bool:
        """Bring the buffers up to date where a parameter changed or moved in memory; whether one had. Looks at numbers
        of the host only. A CUDA graph reads buffers where they are, and they stay there."""
        now = self._now()
        if now == self._stamp:
            return False
        for name in self.merged:
            self._share(name)
        if self.folded is not None:
            for name, value in zip(self.names, self.folded(), strict=True):
                self.buffers[name].copy_(value)
        self._stamp = self._now()
        return True

    def is_current(self) -> bool:
        """Whether every buffer holds what its parameters give now. For checks: compares tensors."""
        parts = all(_is_part(self.sources[source], at) for source, at in self._parts())
        values = self.folded() if self.folded is not None else ()
        return parts and all(torch.equal(self.buffers[n], value) for n, value in zip(self.names, values, strict=True))

    def _keep(self, module: nn.Module, name: str, value: Tensor) -> None:
        module.register_buffer(name, value, persistent=False)
        self.buffers[name] = value

    def _parts(self) -> list[tuple[str, Tensor]]:
        """(parameter, the rows of a buffer that it is)."""
        found = []
        for name, sources in self.merged.items():
            parts = self.buffers[name].split([len(self.sources[source]) for source in sources])
            found += list(zip(sources, parts, strict=True))
        return found

    def _share(self, name: str) -> None:
        for source, part in self._parts():
            parameter = self.sources[source]
            if source in self.merged[name] and not _is_part(parameter, part):
                part.copy_(parameter)
                parameter.data = part

    def _now(self) -> tuple[tuple[int, int], ...]:
        return tuple((tensor.data_ptr(), tensor._version) for tensor in self.sources.values())


def _is_part(parameter: Tensor, part: Tensor) -> bool:
    return parameter.data_ptr() == part.data_ptr() and parameter.stride() == part.stride()
