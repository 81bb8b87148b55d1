"""Which implementation would compute each mixer, and why the Triton kernels would not."""

from __future__ import annotations

import importlib.util

import torch
from torch import fx

from flarec import ops
from flarec.errors import PassError
from flarec.inspect.shapes import shape_text
from flarec.ir.pipeline import run_pipeline
from flarec.ir.program import Program, target_name
from flarec.passes import pipeline
from flarec.passes.lower_mixers import LowerMixers, check_triton
from flarec.passes.properties import CHECKS

from .report import SiteKind

TRITON, PLAIN, REFUSED = "triton", "torch", "refused"


def sites(captured: Program) -> tuple[SiteKind, ...]:
    """Every kind of site of both pipelines, equal ones counted together; empty without the package triton.

    The answer of `lower-mixers(implementation='triton')` site by site, without stopping at the first refusal.
    """
    if importlib.util.find_spec("triton") is None:
        return ()
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for target in ("train", "decode"):
        steps = [step for step in pipeline(target) if not isinstance(step, LowerMixers)]
        program = run_pipeline(captured, steps, CHECKS)
        for node, mixer in ops.sites(program.graph):
            choice, why = _choice(mixer, ops.site_of(node))
            operands = ", ".join(
                f"{value.name} {shape_text(value)}"
                for value in list(node.kwargs.values())[:3]
                if isinstance(value, fx.Node)
            )
            found.setdefault((target, target_name(node).rsplit(".", 1)[-1], choice, why), []).append(operands)
    return tuple(
        SiteKind(target, mixer, operands[0], len(operands), choice, why)
        for (target, mixer, choice, why), operands in found.items()
    )


def availability(device: torch.device) -> str:
    """Why no Triton kernel runs on this device; empty if they may."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed, so nothing can be said about its kernels"
    try:
        check_triton(device)
    except PassError:
        return f"the Triton kernels run on CUDA devices, not on '{device}'"
    return ""


def _choice(mixer: ops.Mixer, site: ops.Site) -> tuple[str, str]:
    """What `--kernels triton` would do with a site, and why it is not Triton."""
    if mixer.implementation(ops.TRITON, site.step) != ops.TRITON:
        return PLAIN, "no Triton form"
    refuses = mixer.forms[ops.TRITON].refuses
    why = refuses(site) if refuses else None
    return (TRITON, "") if why is None else (REFUSED, why)
