"""Semantic ops: one opaque node per token mixer and per expert layer. A room per op, a row per room (`table`).

Shapes: B rows, L tokens, H heads (value heads), Hk key heads, K key dim, V value dim, C channels, W conv width,
N states per channel; over a layout T = Lc + Ln tokens (clean first); R pending rows, M cache slots.
"""

from .count_experts import STREAMS, count_experts, token_streams
from .gated_recurrence import GATED_RECURRENCE
from .linear_attention import LINEAR_ATTENTION
from .mixer import REFERENCE, TORCH, TRITON, Call, Form, FormDerivation, Mixer, Site, Slot, plain_layout, state_dtype
from .moe_experts import MOE_EXPERTS
from .selective_scan import SELECTIVE_SCAN
from .short_conv import SHORT_CONV
from .softmax_attention import SOFTMAX_ATTENTION
from .table import mixer_of, mixers, name_operands, register, site_of, sites

__all__ = [
    "GATED_RECURRENCE",
    "LINEAR_ATTENTION",
    "MOE_EXPERTS",
    "REFERENCE",
    "SELECTIVE_SCAN",
    "SHORT_CONV",
    "SOFTMAX_ATTENTION",
    "STREAMS",
    "TORCH",
    "TRITON",
    "Call",
    "Form",
    "FormDerivation",
    "Mixer",
    "Site",
    "Slot",
    "count_experts",
    "mixer_of",
    "mixers",
    "name_operands",
    "plain_layout",
    "register",
    "site_of",
    "sites",
    "state_dtype",
    "token_streams",
]
