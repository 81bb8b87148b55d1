"""Small models of flash-linear-attention, entered in the table of small models under their model types.

`register` also makes them the families that `tests.families` runs over, so that its suite is the suite here.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import fla.models

from flarec.frontend import tiny
from flarec.frontend.tiny import END_ID, PAD_ID, START_ID, VOCABULARY, TinyModel
from tests import models

_ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 7}
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "pad_token_id": PAD_ID, "bos_token_id": START_ID, "eos_token_id": END_ID, "use_cache": False,
}
_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("Transformer", {"num_heads": 4, "num_kv_heads": 2, "window_size": 9, "qk_norm": True}),
    "gated_deltanet": (
        "GatedDeltaNet", {"attn": _ATTENTION, "head_dim": 16, "num_heads": 2, "num_v_heads": 4, "expand_v": 1.0},
    ),
    "kda": ("KDA", {"attn": _ATTENTION, "head_dim": 16, "num_heads": 2, "num_v_heads": 4}),
    "delta_net": ("DeltaNet", {"attn": _ATTENTION, "num_heads": 4}),
    "gla": ("GLA", {"attn": _ATTENTION, "num_heads": 4, "num_kv_heads": 2}),
    "retnet": ("RetNet", {"attn": _ATTENTION, "num_heads": 4}),
    "linear_attn": ("LinearAttention", {"attn": _ATTENTION, "num_heads": 4}),
    "hgrn2": ("HGRN2", {"attn": _ATTENTION, "num_heads": 4, "expand_ratio": None}),
    "hgrn": ("HGRN", {"attn": _ATTENTION}),
    "mla": (
        "MLA", {"num_heads": 4, "q_lora_rank": 24, "qk_rope_head_dim": 8, "kv_lora_rank": 32, "v_head_dim": 12,
                "qk_nope_head_dim": 16, "qk_head_dim": 24},
    ),
    "samba": ("Samba", {"attn": _ATTENTION, "hidden_ratio": 1, "state_size": 8}),
    "mamba": ("Mamba", {"state_size": 8}),
    "rwkv7": (
        "RWKV7", {"head_dim": 16, "num_heads": None, "decay_low_rank_dim": 8, "gate_low_rank_dim": 8,
                  "a_low_rank_dim": 8, "v_low_rank_dim": 8},
    ),
    "mamba2": ("Mamba2", {"head_dim": 16, "state_size": 16}),
}
NAMES = tuple(_ROWS)


def register() -> None:
    transformers = sys.modules["transformers"]  # it puts a lazy module in its place, which is not the one imported here
    for name, (stem, values) in _ROWS.items():
        config, model = f"Fla{stem}Config", f"Fla{stem}ForCausalLM"
        # the table looks classes up in transformers, which has a Mamba2 of its own
        setattr(transformers, config, getattr(fla.models, f"{stem}Config"))
        setattr(transformers, model, getattr(fla.models, f"{stem}ForCausalLM"))
        tiny.TINY[name] = TinyModel(config, model, _BASE | values)
    os.environ["FLAREC_EVERY_FAMILY"] = "1"  # these are none of those that cover the mixers of transformers' families
    models.ALL_FAMILIES = NAMES  # type: ignore[attr-defined]
    models.PLAIN_FAMILIES = ()  # type: ignore[attr-defined]
