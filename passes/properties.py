"""Property checkers: what a pass claims is looked up on the graph, without sharing the pass's assumptions."""

from __future__ import annotations

import torch

from flarec import ops
from flarec.errors import PropertyError
from flarec.ir.pipeline import Checker, Checks
from flarec.ir.program import Program, locate, placeholder_name
from flarec.ir.wellformed import check_canonical, check_captured
from flarec.ops.mixer import Mixing

from .adapt_noisy_stream import check_noisy_adapted
from .count_experts import check_experts_counted
from .duplicate_streams import PositionIds
from .embed_mask import PARAMETER
from .fold_constants import check_folded
from .lower_mixers import LowerMixers
from .merge_projections import check_merged
from .narrow_adapter import check_adapter_narrowed
from .outline_regions import check_outlined
from .predict_horizon import check_horizon_predicted
from .quantize_base import check_base_quantized
from .split_head import check_head_split
from .split_streams import check_streams_split
from .token_local import Watch

ATEN = torch.ops.aten


def _names(program: Program) -> set[str]:
    return {node.name for node in program.placeholders()}


def check_two_stream(program: Program) -> None:
    """Positions come from the layout. That nothing but mixers relates tokens holds for every program (`Watch`)."""
    if "position_ids" in _names(program) and type(program.derivations.get("position_ids")) is not PositionIds:
        raise PropertyError("position_ids is still an input; positions must come from the layout")


def _no_captured(mixing: Mixing) -> Checker:
    """No op of that kind is left as it was captured."""

    def check(program: Program) -> None:
        for node, mixer in ops.sites(program.graph):
            if mixer.mixing == mixing and not isinstance(node.target, ops.Call):
                raise PropertyError(f"{locate(node)} still sees one causal document per row")

    return check


def check_narrowed(program: Program) -> None:
    """The head's input is gathered by `head_rows`."""
    rows = [node for node in program.placeholders() if node.name == "head_rows"]
    if not rows or not rows[0].users:
        raise PropertyError("no node reads head_rows")
    for user in rows[0].users:
        if user.target is not ATEN.index_select.default:
            raise PropertyError(f"{locate(user)} reads head_rows but does not select rows")


def check_logits(program: Program) -> None:
    """The first output of the graph is the logits, so a pass that changes them finds them there."""
    if program.head is not None or program.outputs[0] != "logits":
        raise PropertyError(f"the first output of the graph is '{program.outputs[0]}'")


def check_mask_embedded(program: Program) -> None:
    """If there is a mask vector, the embedding result depends on it."""
    used = any(node.op == "get_attr" and node.target == PARAMETER for node in program.graph.nodes)
    if PARAMETER in program.extra and not used:
        raise PropertyError(f"parameter '{PARAMETER}' is not used by the graph")


def check_cached(program: Program) -> None:
    """Every cache slot is an input, comes back as an output unless it is written in place, and every mixer has them."""
    if not program.cache_slots:
        raise PropertyError("the program has no cache slot")
    names = _names(program)
    for slot in program.cache_slots:
        if placeholder_name(slot.name) not in names:
            raise PropertyError(f"cache slot '{slot.name}' is not an input")
        if not slot.in_place and slot.name not in program.outputs:
            raise PropertyError(f"cache slot '{slot.name}' is not returned")
    for node, mixer in ops.sites(program.graph):
        if mixer.mixing != "none" and not (isinstance(node.target, ops.Call) and node.target.step):
            raise PropertyError(f"{locate(node)} has no cache")


def check_lowered(program: Program) -> None:
    """No mixer is left to the reference unless that was asked for, and every derived tensor is read."""
    lowering = [record for record in program.history if record.name == LowerMixers.name]
    reference = bool(lowering) and lowering[-1].options["implementation"] == ops.REFERENCE
    for node, _ in ops.sites(program.graph):
        if not reference and (not isinstance(node.target, ops.Call) or node.target.implementation == ops.REFERENCE):
            raise PropertyError(f"{locate(node)} still runs the reference")
    for node in program.placeholders():
        if node.name in program.derivations and not node.users:
            raise PropertyError(f"derived input '{node.name}' is not read by any node")


CHECKERS: dict[str, Checker] = {
    "captured": check_captured,
    "canonical": check_canonical,
    "two-stream": check_two_stream,
    "masked": _no_captured("attention"),
    "state-scheduled": _no_captured("state"),
    "narrowed": check_narrowed,
    "logits": check_logits,
    "head-split": check_head_split,
    "mask-embedded": check_mask_embedded,
    "noisy-adapted": check_noisy_adapted,
    "adapter-narrowed": check_adapter_narrowed,
    "experts-counted": check_experts_counted,
    "streams-split": check_streams_split,
    "cached": check_cached,
    "projections-merged": check_merged,
    "constants-folded": check_folded,
    "regions-outlined": check_outlined,
    "horizon-predicted": check_horizon_predicted,
    "base-quantized": check_base_quantized,
    "lowered": check_lowered,
}

CHECKS = Checks(CHECKERS, Watch)
