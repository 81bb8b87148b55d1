"""A batched, training-only gated delta rule and causal convolution in plain PyTorch, put in place of the fallbacks.

The reference fallbacks of `transformers` are correct but slow without extra kernel packages. `installed()` swaps in the
versions below while a model trains (no cache, no packed rows); they compute the same function. Inside a chunk the delta
rule is a unit lower triangular system, inverted by blocks; across chunks the state follows S' = M S + B, so only one
small matrix product per chunk is sequential and everything else is batched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

CHUNK = 32
CALLS = {"delta": 0, "conv": 0}


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """The inverse of I + L for strictly lower triangular L of a size that is 16 times a power of two."""
    size = lower.shape[-1]
    if size <= 16:
        inverse = torch.eye(size, device=lower.device, dtype=lower.dtype) - lower
        power = lower @ lower
        for _ in range(3):  # (I - L)(I + L^2)(I + L^4)(I + L^8), as L^16 = 0
            inverse = inverse + inverse @ power
            power = power @ power
        return inverse
    half = size // 2
    blocks = unit_lower_inverse(torch.stack((lower[..., :half, :half], lower[..., half:, half:])))
    cross = -blocks[1] @ lower[..., half:, :half] @ blocks[0]
    top = torch.cat((blocks[0], torch.zeros_like(cross)), dim=-1)
    return torch.cat((top, torch.cat((cross, blocks[1]), dim=-1)), dim=-2)


class UnitLowerInverse(torch.autograd.Function):
    """`unit_lower_inverse` with the gradient -T' G T', which needs only the result T."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        """Invert and keep the inverse."""
        inverse = unit_lower_inverse(lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Gradient with respect to the strictly lower triangle."""
        (inverse,) = ctx.saved_tensors
        turned = inverse.mT
        return -(turned @ grads[0] @ turned).tril(-1)


def chunk_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, **unused: Any,
) -> tuple[Tensor, None]:
    """Gated delta rule over whole rows [batch, length, heads, dim], in float32 whatever the inputs are."""
    if initial_state is not None or output_final_state or unused.get("cu_seqlens") is not None:
        raise ValueError("the training delta rule knows neither caches nor packed rows")
    CALLS["delta"] += 1
    dtype, length = query.dtype, query.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        if key.shape[2] != value.shape[2]:
            query, key = (x.repeat_interleave(value.shape[2] // x.shape[2], dim=2) for x in (query, key))
        q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
        gate, rate = (x.transpose(1, 2).float() for x in (g, beta))
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        q = q * q.shape[-1] ** -0.5
        pad = -length % CHUNK
        if pad:
            q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
            gate, rate = F.pad(gate, (0, pad)), F.pad(rate, (0, pad))
        q, k, v = (x.unflatten(2, (-1, CHUNK)) for x in (q, k, v))
        total = gate.unflatten(2, (-1, CHUNK)).cumsum(-1)
        rate = rate.unflatten(2, (-1, CHUNK)).unsqueeze(-1)
        upper = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(upper, -torch.inf).exp()
        grown, end = total.exp().unsqueeze(-1), total[..., -1:]
        inverse = UnitLowerInverse.apply(((k * rate) @ k.mT * decay).tril(-1))
        values, reads = inverse @ (v * rate), inverse @ (k * rate * grown)
        turned = (k * (end - total).exp().unsqueeze(-1)).mT
        write = turned @ values
        keep = end.exp().unsqueeze(-1) * torch.eye(k.shape[-1], device=k.device) - turned @ reads
        states = [torch.zeros_like(write[:, :, 0])]
        for index in range(write.shape[2] - 1):
            states.append(keep[:, :, index] @ states[-1] + write[:, :, index])
        state = torch.stack(states, dim=2)
        out = (q * grown) @ state + (q @ k.mT * decay) @ (values - reads @ state)
        out = out.flatten(2, 3)[:, :, :length].transpose(1, 2)
    return out.to(dtype).contiguous(), None


def causal_conv1d(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """Depthwise causal convolution of [batch, channels, length] as a sum of shifted products."""
    CALLS["conv"] += 1
    if bias is not None or activation != "silu":
        raise ValueError("the training convolution is written for silu without a bias")
    width, length = weight.shape[-1], hidden_states.shape[-1]
    padded = F.pad(hidden_states.transpose(1, 2), (0, 0, width - 1, 0))
    taps = weight.to(padded.dtype)
    out = padded[:, :length] * taps[:, 0]
    for index in range(1, width):
        out = out + padded[:, index : index + length] * taps[:, index]
    return F.silu(out).transpose(1, 2)


@contextlib.contextmanager
def installed() -> Iterator[dict[str, int]]:
    """Use the functions of this module in the Qwen3.5 layers; gives the call counts, so that a caller can be sure."""
    swaps = {"torch_chunk_gated_delta_rule": chunk_gated_delta_rule, "causal_conv1d_fn": causal_conv1d}
    missing = [name for name in swaps if not hasattr(modeling_qwen3_5, name)]
    if missing:
        raise RuntimeError(f"this version of transformers has no {missing} in modeling_qwen3_5")
    before = {name: getattr(modeling_qwen3_5, name) for name in swaps}
    CALLS.update(delta=0, conv=0)
    try:
        for name, function in swaps.items():
            setattr(modeling_qwen3_5, name, function)
        yield CALLS
    finally:
        for name, function in before.items():
            setattr(modeling_qwen3_5, name, function)
