"""Softmax attention, its masks and experts: transformers has interfaces for them, so no family needs a row for them.

transformers asks the mask interface for a mask and hands it to the attention function of the layer. Ours hands over
what the mask means, a `Causal`, and the attention hook turns it into an argument of the op: the layer's window is the
one that its mask has, whatever else the layer says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ... import ops
from ...errors import CaptureError

IMPLEMENTATION = "flarec"
"""Name under which our functions are registered with transformers' attention and experts interfaces."""

EXPERT_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2")
"""Activations of `flarec::moe_experts`, by their transformers names."""


CONTEXT = frozenset({"position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions"})
"""What models pass along to every mixer, and mixer functions do not read."""


def reject(where: str, **values: object) -> None:
    """Stop at an argument that the semantic op has no place for (a silent drop would change the model)."""
    for name, value in values.items():
        if value is not None and value is not False and name not in CONTEXT:
            raise CaptureError(
                f"{where} is given {name}, which no semantic op covers; such a model cannot be converted"
            )


@dataclass(frozen=True)
class Causal:
    """A causal mask, over the last `window` positions (the token's own included) or over all."""

    window: int | None = None

    def _computes(self, *args: Any) -> Any:
        raise CaptureError(
            "the model computes with its attention mask itself; only attention that goes through transformers' "
            "attention interface is recognised"
        )

    __add__ = __radd__ = __mul__ = __rmul__ = __getitem__ = __invert__ = _computes


# Parts of mask functions by their qualified names in transformers.masking_utils. Anything else is not a causal mask.
_CAUSAL = "causal_mask_function"
_WINDOW = "sliding_window_overlay.<locals>.inner_mask"
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"  # documents, found from position_ids: the layout's task
_COMBINED = ("and_masks.<locals>.and_mask", "remap_positions_for_packed_sequence.<locals>.inner_mask")


def _parts(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The functions that a mask function is the intersection of."""
    if function.__qualname__ not in _COMBINED:
        yield function
        return
    for cell in function.__closure__ or ():
        for part in cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,):
            if callable(part) and not isinstance(part, Tensor):
                yield from _parts(part)


def mask_hook(*args: Any, mask_function: Callable[..., Any], attention_mask: Any = None, **kwargs: Any) -> Causal:
    """`AttentionMaskInterface` function: what the mask means, or `CaptureError` if it is not causal."""
    reject("an attention mask", padding=attention_mask)
    causal, windows = False, set()
    for part in _parts(mask_function):
        if part.__qualname__ == _CAUSAL:
            causal = True
        elif part.__qualname__ == _WINDOW:
            windows |= {int(cell.cell_contents) for cell in part.__closure__ or ()}
        elif part.__qualname__ != _PACKED:
            raise CaptureError(
                f"the model asks for an attention mask by {part.__qualname__.split('.')[0]}, which is neither causal "
                "nor a sliding window; such a model cannot be converted"
            )
    if not causal:
        raise CaptureError("the model asks for a mask that is not causal; only causal language models can be converted")
    return Causal(min(windows) if windows else None)


def attention_hook(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Causal | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`AttentionInterface` function: q [B,H,L,Dqk], k [B,Hkv,L,Dqk], v [B,Hkv,L,Dv] -> [B,L,H,Dv].

    dropout is the layer's own for its mode; capture runs in eval mode, where it is 0 (docs/architecture.md).
    """
    where = f"attention of {type(module).__name__}"
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise CaptureError(f"{where} is not causal; only causal language models can be converted")
    if kwargs.get("s_aux") is not None:
        raise CaptureError(
            f"{where} has sinks (a learned logit per head that takes part of the softmax), which "
            "flarec::softmax_attention does not cover; such a model cannot be converted"
        )
    if not isinstance(attention_mask, Causal):
        raise CaptureError(f"{where} is called without the model's causal mask; such a model cannot be converted")
    known = ("is_causal", "s_aux", "softcap", "sliding_window")
    reject(where, **{name: x for name, x in kwargs.items() if name not in known})
    scale = float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5
    softcap = kwargs.get("softcap") or None
    output = ops.SOFTMAX_ATTENTION(
        query.contiguous(), key.contiguous(), value.contiguous(), scale, attention_mask.window, softcap
    )
    return output, None


def experts_hook(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`ExpertsInterface` function: x [N,D], index [N,k], weight [N,k] -> [N,D]."""
    from transformers.integrations.moe import _default_apply_gate

    where = f"experts {type(module).__name__}"
    reject(
        where,
        biases=getattr(module, "has_bias", False),
        interleaved_gates=not getattr(module, "is_concatenated", True),
        norms=getattr(module, "has_post_expert_norm", False),
    )
    gated = bool(getattr(module, "has_gate", True))
    if gated and type(module)._apply_gate is not _default_apply_gate:
        raise CaptureError(f"{where} have a gate of their own (_apply_gate), which flarec::moe_experts does not cover")
    up, down = module.gate_up_proj if gated else module.up_proj, module.down_proj
    if getattr(module, "is_transposed", False):
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    return ops.MOE_EXPERTS(hidden_states, top_k_index, top_k_weights, up, down, _activation(module, where), gated)


def _activation(module: Any, where: str) -> str:
    """The name of the experts' activation, from the module that applies it."""
    from torch.nn import functional as F
    from transformers.activations import ACT2FN

    act = module.act_fn
    functions = {"silu": F.silu, "relu": F.relu}
    for name in EXPERT_ACTIVATIONS:
        if act is functions.get(name) or type(act) is type(ACT2FN[name]):
            return name
    raise CaptureError(
        f"{where} have the activation {getattr(act, '__name__', type(act).__name__)}; flarec::moe_experts covers "
        f"{', '.join(EXPERT_ACTIVATIONS)}"
    )


def register_interfaces() -> None:
    """Make our attention, mask and experts functions known to transformers (idempotent)."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attention_hook)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_hook)
    ExpertsInterface.register(IMPLEMENTATION, experts_hook)
