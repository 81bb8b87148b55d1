"""Choose the implementation of every mixer, explicitly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from flarec import ops
from flarec.errors import PassError
from flarec.ir.pipeline import Claims, Pass
from flarec.ir.program import Program, locate
from flarec.ops import self_test

IMPLEMENTATIONS = (ops.TORCH, ops.TRITON, ops.REFERENCE)
CONTIGUOUS = torch.ops.aten.contiguous.default


@dataclass(frozen=True)
class LowerMixers(Pass):
    """Replace layout-reading mixers by kernels that read tensors derived from the layout once per batch.

    before   %o = stream_ops.two_stream_softmax_attention(q=%q, k=%k, v=%v, scale, window, softcap, layout=%layout)
    after    %softmax_mask = derived from layout
             %o = lowered.softmax_attention(q=%q, k=%k, v=%v, scale, window, softcap, mask=%softmax_mask)

    implementation 'triton' takes the Triton form of every op that has one, for training or for decoding; the others
    become those of 'torch' (the nodes' names say which is which). A site that the Triton kernels cannot run is an
    error.
    """

    implementation: str = ops.TORCH
    chunk_size: int = 64

    name: ClassVar[str] = "lower-mixers"
    requires: ClassVar[Claims] = frozenset({"masked", "state-scheduled"})
    provides: ClassVar[Claims] = frozenset({"lowered"})

    def apply(self, program: Program) -> list[fx.Node]:
        if self.implementation not in IMPLEMENTATIONS:
            raise PassError(
                f"pass '{self.name}': unknown implementation '{self.implementation}'; "
                f"use {', '.join(IMPLEMENTATIONS[:-1])} or {IMPLEMENTATIONS[-1]}"
            )
        sites = [node for node, mixer in ops.sites(program.graph)]
        if self.implementation == ops.REFERENCE:
            return sites
        if self.implementation == ops.TRITON:
            check_triton(program.device)
        kinds = [self._kind(node) for node in sites]
        for node in sites:
            self._lower(program, node)
        self_test.require([kind for kind in kinds if kind is not None], program.device)
        layout = program.placeholder("layout")
        if not layout.users and "cached" not in program.properties:
            program.graph.erase_node(layout)
        return sites

    def _kind(self, node: fx.Node) -> tuple[ops.Mixer, ops.Site, bool] | None:
        """A site that a Triton kernel will compute, as `self_test` takes it."""
        mixer, site = ops.mixer_of(node.target), ops.site_of(node, self.chunk_size)
        assert mixer is not None
        if self.implementation != ops.TRITON or mixer.implementation(self.implementation, site.step) != ops.TRITON:
            return None
        return mixer, site, isinstance(node.target, ops.Call) and node.target.frozen_clean

    def _lower(self, program: Program, node: fx.Node) -> None:
        mixer, site = ops.mixer_of(node.target), ops.site_of(node, self.chunk_size)
        assert mixer is not None
        implementation = mixer.implementation(self.implementation, site.step)
        form = mixer.forms[implementation]
        why = form.refuses(site) if form.refuses else None
        if why is not None:
            raise PassError(
                f"pass '{self.name}': the {implementation.capitalize()} kernels cannot run {locate(node)}: {why}; "
                f"use --kernels {ops.TORCH}"
            )
        operands = dict(node.kwargs)
        derivation = form.derivation(site)
        if derivation is not None:
            layout = operands.pop("layout")
            program.derivations[derivation.name] = derivation  # equal sites read the same one
            operands[derivation.operand] = program.placeholder(derivation.name)
            if site.step:
                operands["layout"] = layout
        node.kwargs = operands
        for name in form.in_place:
            _read_in_place(program, node, name)
        frozen = isinstance(node.target, ops.Call) and node.target.frozen_clean
        node.target = mixer.call(implementation, site.step, frozen)


def check_triton(device: torch.device) -> None:
    """Raise `PassError` where Triton cannot run: it needs the package and a GPU, or its interpreter (the meta device
    runs nothing)."""
    try:
        import triton  # the other implementations do without
    except ModuleNotFoundError as error:
        raise PassError(
            "the Triton kernels need the package triton; install flarec[gpu], or use --kernels torch"
        ) from error
    if device.type in ("cuda", "meta") or triton.knobs.runtime.interpret:
        return
    raise PassError(
        f"the Triton kernels run on CUDA devices, and this model is on '{device}'; use --device cuda or --kernels "
        "torch (TRITON_INTERPRET=1 runs them on the CPU, slowly, for tests)"
    )


def _read_in_place(program: Program, node: fx.Node, name: str) -> None:
    """Leave out a copy of an operand into another memory order: the kernels read a projection where it lies."""
    copy = node.kwargs[name]
    assert isinstance(copy, fx.Node)
    if copy.target is not CONTIGUOUS:
        return
    source = copy.args[0]
    assert isinstance(source, fx.Node)
    node.kwargs = node.kwargs | {name: source}
    if not copy.users:
        program.graph.erase_node(copy)
