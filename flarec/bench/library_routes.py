"""Two-stream gated delta rule out of library calls: what one would write without a kernel for it.

Two routes, both differentiable. Clean and noisy streams are q, k, v, g, beta with shapes [B, L, H, .]; block j of size
B holds positions j B .. (j+1) B - 1 of every view, is anchored at its first position and is read as a whole
(block_end). 64 | L and B | 64.

* `simple_route` keeps the clean state at every block boundary in memory, L / B of them, and runs the noisy blocks as
  that many short sequences with an initial state.
* `virtual_query_route` keeps none: it puts the noisy keys and queries of a block before the clean tokens of that block,
  as tokens that read the state and write nothing. The part inside a block is a second call, over blocks separated by a
  gate that forgets everything.

They call kernels of flash-linear-attention 0.6.0 below its public interface. docs/kernels.md has the equations.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

CHUNK = 64
LOG2E = 1.4426950408889634
FORGET = -30.0
"""A log decay after which nothing is left in bfloat16."""

Stream = Sequence[Tensor]


@functools.cache
def _fla() -> Any:
    """The library's functions; imported on use, because the package imports without the library."""
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
    from fla.ops.common.chunk_o import chunk_bwd_dqkwg, chunk_bwd_dv_local, chunk_fwd_o
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
    from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd, recompute_w_u_fwd
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.index import prepare_chunk_indices

    return SimpleNamespace(
        rule=chunk_gated_delta_rule,
        states=chunk_gated_delta_rule_fwd_h,
        intra=chunk_gated_delta_rule_fwd_intra,
        outputs=chunk_fwd_o,
        outputs_backward=chunk_bwd_dqkwg,
        values_backward=chunk_bwd_dv_local,
        recompute=recompute_w_u_fwd,
        intra_backward=prepare_wy_repr_bwd,
        cumsum=chunk_local_cumsum,
        chunk_indices=prepare_chunk_indices,
    )


def simple_route(clean: Stream, noisy: Sequence[Stream], block: int, scale: float) -> list[Tensor]:
    """Outputs [B, L, H, V] of the clean stream and of every view."""
    out, starts = _CleanWithStarts.apply(*clean, block, scale)  # type: ignore[no-untyped-call]
    return [out, *(_blocks_from(starts, view, block, scale) for view in noisy)]


def virtual_query_route(clean: Stream, noisy: Sequence[Stream], block: int, scale: float) -> list[Tensor]:
    """As `simple_route`."""
    views, value_dim = len(noisy), clean[2].shape[3]
    extra = 2 * block * views  # virtual tokens before the clean tokens of every block
    q, k, v, g, beta = (_in_blocks(x, block) for x in clean)
    asking = [_in_blocks(x, block) for view in noisy for x in (view[1], view[0])]  # keys ask for R, queries for X

    def after_virtual(x: Tensor) -> Tensor:
        rows, blocks = x.shape[:2]
        return torch.cat([x.new_zeros(rows, blocks, extra, *x.shape[3:]), x], dim=2).flatten(1, 2)

    joined = torch.cat([*asking, q], dim=2).flatten(1, 2)
    out = _fla().rule(joined, *(after_virtual(x) for x in (k, v, g, beta)), scale=1.0)[0]
    out = out.unflatten(1, (-1, extra + block))
    results = [(out[:, :, extra:] * scale).flatten(1, 2)]
    for index, view in enumerate(noisy):
        at = 2 * block * index
        read_by_keys, read_by_queries = out[:, :, at : at + block], out[:, :, at + block : at + 2 * block]
        results.append(_inside_blocks(view, read_by_keys, read_by_queries, block, scale))
    assert results[0].shape[3] == value_dim
    return results


def _inside_blocks(view: Stream, read_by_keys: Tensor, read_by_queries: Tensor, block: int, scale: float) -> Tensor:
    """A view's outputs, from what its keys and queries read of the starting states [B, blocks, block, H, V]."""
    q, k, v, g, beta = (_in_blocks(x, block) for x in view)
    total = g.cumsum(dim=2)
    start = read_by_keys * total.exp()[..., None].to(read_by_keys.dtype)
    from_start = read_by_queries * total[:, :, -1:].exp()[..., None].to(read_by_queries.dtype)
    nothing = torch.zeros_like
    forget = torch.cat([torch.full_like(g[:, :, :1], FORGET), g[:, :, 1:], nothing(g)], dim=2)

    def then(updates: Tensor, queries: Tensor) -> Tensor:
        return torch.cat([updates, queries], dim=2).flatten(1, 2)

    out = _fla().rule(
        then(nothing(q), q), then(k, nothing(k)), then(v - start, nothing(v)), forget.flatten(1, 2),
        then(beta, nothing(beta)), scale=1.0,
    )[0]
    out = out.unflatten(1, (-1, 2 * block))[:, :, block:]
    result: Tensor = ((out + from_start) * scale).flatten(1, 2)
    return result


def _blocks_from(starts: Tensor, view: Stream, block: int, scale: float) -> Tensor:
    """A view's outputs: every block a sequence of its own, updates first and then queries that change nothing."""
    rows, length, heads, _ = view[0].shape
    count = rows * length // block
    q, k, v, g, beta = (x.reshape(count, block, *x.shape[2:]) for x in view)
    if block > 1:
        q = torch.cat([torch.zeros_like(q), q], dim=1)
        k, v, g, beta = (torch.cat([x, torch.zeros_like(x)], dim=1) for x in (k, v, g, beta))
    each = q.shape[1]
    chunk = 16 if each <= 16 else 32 if each <= 32 else CHUNK
    ends, chunks = _sequences(count, each, chunk, q.device)
    out = _fla().rule(
        *(x.flatten(0, 1)[None] for x in (q, k, v, g, beta)),
        scale=scale, initial_state=starts.reshape(count, heads, *starts.shape[3:]), cu_seqlens=ends,
        chunk_indices=chunks, chunk_size=chunk,
    )[0]
    result: Tensor = out.view(count, each, heads, -1)[:, -block:].reshape(rows, length, heads, -1)
    return result


_known_sequences: dict[tuple[int, int, int, torch.device], tuple[Tensor, Tensor]] = {}


def _sequences(count: int, each: int, chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    key = (count, each, chunk, device)
    if key not in _known_sequences:
        ends = torch.arange(0, count * each + 1, each, device=device, dtype=torch.long)
        _known_sequences[key] = (ends, _fla().chunk_indices(ends, chunk))
    return _known_sequences[key]


def _in_blocks(x: Tensor, block: int) -> Tensor:
    blocks: Tensor = x.unflatten(1, (-1, block))
    return blocks


def _by_chunk(x: Tensor) -> Tensor:
    """[B, L, H, .] -> [B, chunks, H, 64, .], dense."""
    chunks: Tensor = x.unflatten(1, (-1, CHUNK))
    return chunks.transpose(2, 3).contiguous()


def _by_token(x: Tensor) -> Tensor:
    """The inverse of `_by_chunk`."""
    return x.transpose(2, 3).flatten(1, 2)


class _CleanWithStarts(torch.autograd.Function):
    """The clean stream's output, and its state before every block [B, L / block, H, K, V] in the dtype of k.

    The state before block b of a chunk is the chunk's entry state, decayed, plus a sum over the chunk's tokens before
    the block. The backward adds the gradients of these states to that of the corrected values and to the keys and
    gates, and carries the rest through the chain of chunks, one product per chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, block: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        decay = _fla().cumsum(g, chunk_size=CHUNK, scale=LOG2E)
        w, u, inverse = _fla().intra(k=k, v=v, g=decay, beta=beta, chunk_size=CHUNK)
        entry, corrected, _ = _fla().states(k=k, w=w, u=u, g=decay, chunk_size=CHUNK)
        out = _fla().outputs(q=q, k=k, v=corrected, h=entry, g=decay, scale=scale, chunk_size=CHUNK)
        rows, chunks, heads, key_dim, value_dim = entry.shape
        starts = k.new_empty(rows, chunks, CHUNK // block, heads, key_dim, value_dim)
        starts[:, :, 0] = entry
        keys, values, log = _by_chunk(k), _by_chunk(corrected), _by_chunk(decay[..., None]).squeeze(-1)
        for index in range(1, CHUNK // block):
            end = index * block
            left = torch.exp2(log[..., end - 1 : end] - log[..., :end])[..., None]
            update = (keys[..., :end, :] * left).to(k.dtype).mT @ values[..., :end, :]
            kept = torch.exp2(log[..., end - 1])[..., None, None].to(entry.dtype)
            torch.addcmul(update, entry, kept, out=starts[:, :, index])
        ctx.save_for_backward(q, k, v, decay, beta, inverse)
        ctx.block, ctx.scale = block, scale
        return out, starts.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_starts: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, beta, inverse = ctx.saved_tensors
        block, scale = ctx.block, ctx.scale
        grad_out = grad_out.contiguous()
        w, u = _fla().recompute(k=k, v=v, beta=beta, A=inverse, g=decay)
        entry, corrected, _ = _fla().states(k=k, w=w, u=u, g=decay, chunk_size=CHUNK)
        local = _fla().values_backward(q=q, k=k, g=decay, do=grad_out, scale=scale, chunk_size=CHUNK)
        keys, values, log = _by_chunk(k), _by_chunk(corrected), _by_chunk(decay[..., None]).squeeze(-1)
        grad_values = _by_chunk(local).float()
        grad_starts = grad_starts.unflatten(1, (-1, CHUNK // block))
        grad_keys, grad_log = torch.zeros_like(keys, dtype=torch.float32), torch.zeros_like(log)
        grad_entry = grad_starts[:, :, 0].float()
        for index in range(1, CHUNK // block):
            end = index * block
            grad = grad_starts[:, :, index]
            left = torch.exp2(log[..., end - 1 : end] - log[..., :end])[..., None]
            kept = torch.exp2(log[..., end - 1])
            decayed = (keys[..., :end, :] * left).to(k.dtype)
            grad_entry.addcmul_(grad.float(), kept[..., None, None])
            grad_values[..., :end, :] += decayed @ grad
            grad_decayed = (values[..., :end, :] @ grad.mT).float()
            grad_keys[..., :end, :].addcmul_(grad_decayed, left)
            through = (grad_decayed * decayed.float()).sum(-1)
            grad_log[..., :end] -= through
            at_end = kept * (entry.flatten(3) * grad.flatten(3)).float().sum(-1)
            grad_log[..., end - 1] += through.sum(-1) + at_end
        grad_exit = _CleanWithStarts._states_gradient(q, w, keys, log, grad_out, grad_values, grad_entry, entry, scale)
        tail = (keys * torch.exp2(log[..., -1:] - log)[..., None]).to(k.dtype)
        grad_u = _by_token(((tail @ grad_exit).float() + grad_values).to(v.dtype)).contiguous()
        grad_q, grad_k, grad_w, grad_g = _fla().outputs_backward(
            q=q, k=k, v=corrected, w=w, g=decay, h=entry, dv=grad_u, do=grad_out, dh=grad_exit, scale=scale,
            chunk_size=CHUNK,
        )
        more_k, grad_v, grad_beta, more_g = _fla().intra_backward(
            k=k, v=v, beta=beta, g=decay, A=inverse, dw=grad_w, du=grad_u
        )
        grad_k = grad_k + more_k + _by_token(grad_keys)
        grad_g = grad_g + more_g + _by_token(grad_log[..., None]).squeeze(-1)
        grad_g = _fla().cumsum(grad_g, chunk_size=CHUNK, reverse=True)
        return (
            grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_g, grad_beta.to(beta.dtype), None, None,
        )

    @staticmethod
    def _states_gradient(
        q: Tensor, w: Tensor, keys: Tensor, log: Tensor, grad_out: Tensor, grad_values: Tensor, grad_entry: Tensor,
        entry: Tensor, scale: float,
    ) -> Tensor:
        """Gradients of the states after every chunk, [B, chunks, H, K, V]: a walk from the last chunk to the first."""
        tail = (keys * torch.exp2(log[..., -1:] - log)[..., None]).to(q.dtype)
        queries = (_by_chunk(q) * torch.exp2(log)[..., None] * scale).to(q.dtype)
        writes = _by_chunk(w)
        own = (queries.mT @ _by_chunk(grad_out)).float() - (writes.mT @ grad_values.to(q.dtype)).float() + grad_entry
        identity = torch.eye(keys.shape[-1], device=q.device)
        step = torch.exp2(log[..., -1])[..., None, None] * identity - (writes.mT @ tail).float()
        result = torch.empty_like(entry)
        carried = torch.zeros_like(own[:, 0])
        for index in range(entry.shape[1] - 1, -1, -1):
            result[:, index] = carried
            carried = torch.baddbmm(
                own[:, index].flatten(0, 1), step[:, index].flatten(0, 1), carried.flatten(0, 1)
            ).view_as(carried)
        return result
