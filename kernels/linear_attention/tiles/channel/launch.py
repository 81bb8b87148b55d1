"""Launches of the kernels for key-channel gates: what the forward reads instead of q, k and g, and the whole backward.

The backward computes the forward's weights again rather than keeping them: they are about as large as q and k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import states_grad
from ..problem import Problem
from ..schedule import TileSchedule
from . import finish, finish_digits, grad, norm, weights, weights_digits


@dataclass(frozen=True)
class ChannelLaunch:
    """Width of a program's tile (channels of K, or columns of V), warps, depth of the software pipeline, and the most
    registers of a thread (None: the compiler's choice)."""

    tile: int
    warps: int
    stages: int
    registers: int | None = None


# Measured on an H100 with K = V = 128 (benchmarks/NOTES.md).
LAUNCHES = {
    "channel_clean": ChannelLaunch(64, 4, 1),
    "channel_block": ChannelLaunch(64, 4, 1),
    "channel_prefix": ChannelLaunch(128, 4, 1),
    "channel_clean_digits": ChannelLaunch(64, 4, 1),
    "channel_block_digits": ChannelLaunch(32, 4, 1),
    "channel_prefix_digits": ChannelLaunch(32, 4, 1),
    "channel_noisy_grad": ChannelLaunch(128, 4, 1),
    "channel_chunk_grad": ChannelLaunch(128, 4, 1),
    "channel_clean_grad": ChannelLaunch(128, 4, 1),
    "channel_tile_finish": ChannelLaunch(32, 4, 1),
    "channel_clean_finish": ChannelLaunch(64, 4, 1),
    "channel_norm_grad": ChannelLaunch(128, 4, 1),
    "channel_prefix_finish_digits": ChannelLaunch(64, 8, 1),
    "channel_block_finish_digits": ChannelLaunch(32, 4, 1),
    "channel_clean_finish_digits": ChannelLaunch(64, 8, 1),
}
# Float32 rows of at most 64, which come in chunks of 64: with 4 warps ptxas makes wrong code of these two
# (benchmarks/NOTES.md, "A compiler trap").
SINGLE = {"channel_tile_finish": ChannelLaunch(32, 8, 1), "channel_clean_finish": ChannelLaunch(32, 8, 1)}
PER_SLICE = ("channel_tile_finish", "channel_clean_finish")
KERNELS: dict[str, Any] = {
    name: getattr(module, f"{name}_kernel")
    for module, names in (
        (weights, ("channel_clean", "channel_block", "channel_prefix")),
        (weights_digits, ("channel_clean_digits", "channel_block_digits", "channel_prefix_digits")),
        (grad, ("channel_noisy_grad", "channel_chunk_grad", "channel_clean_grad")),
        (norm, ("channel_norm_grad",)),
        (finish, ("channel_tile_finish", "channel_clean_finish")),
        (finish_digits,
         ("channel_prefix_finish_digits", "channel_block_finish_digits", "channel_clean_finish_digits")),
    )
    for name in names
}


def launch_of(p: Problem, name: str) -> ChannelLaunch:
    narrow = p.dtype == torch.float32 and p.block_k <= 64
    return SINGLE.get(name, LAUNCHES[name]) if narrow else LAUNCHES[name]


def flags(p: Problem, name: str) -> dict[str, Any]:
    """Values of the constexpr arguments, by name.

    SPAN: bits of decay for which one product takes all pairs. Factors of 2^80 leave 46 bits of float32's exponents to
    the rows themselves; in float16 little more than one product of small numbers is left.
    """
    tile = launch_of(p, name).tile
    tile_k = min(tile, p.block_k)
    widest = 64 if p.block_k > 128 or p.dtype == torch.float32 else 128
    tile_v = min(tile, widest, max(p.least_columns, 1 << (p.value_dim - 1).bit_length()))
    largest = 1 << (max(p.largest_block, 1) - 1).bit_length()
    return {
        "H": p.heads,
        "GROUP": p.group,
        "BK": p.block_k,
        "BS": tile_k,
        "NS": -(-p.key_dim // tile_k),
        "BV": tile_v,
        "NV": -(-p.value_dim // tile_v),
        "C": p.chunk_size,
        "R": p.tile_rows,
        "LEVELS": p.chunk_size.bit_length() - 1,
        "BLOCK_LEVELS": largest.bit_length(),
        "LARGEST": largest,
        "DELTA": p.delta,
        "L2NORM": p.l2norm,
        "EXACT_K": p.key_dim == p.block_k,
        "EXACT_S": p.key_dim % tile_k == 0,
        "EXACT_V": p.value_dim % tile_v == 0,
        "PRECISION": "tf32x3" if p.dtype == torch.float32 else "tf32",
        "SPAN": 4.0 if p.dtype == torch.float16 else 80.0,
        "PIECES": 3 if p.dtype == torch.float32 else 2,
        "key_dim": p.key_dim,
        "value_dim": p.value_dim,
    }


def _run(p: Problem, name: str, programs: int, operands: dict[str, Any]) -> None:
    """Run `programs` programs of a kernel (times the tiles of V of the chunk kernel); arguments are taken by name."""
    kernel, launch = KERNELS[name], launch_of(p, name)
    known = operands | flags(p, name)
    if name == "channel_chunk_grad":
        programs *= known["NV"]
    if name in PER_SLICE:
        programs *= known["NS"]
    if programs:
        taken = {n: known[n] for n in kernel.arg_names}
        kernel[(programs,)](**taken, num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers)


def decay(p: Problem, g: Tensor, operands: dict[str, Any], schedule: TileSchedule) -> dict[str, Tensor]:
    """Decayed vectors and pair weights of all chunks and tiles, by the names of the kernels' arguments.

    g [B, T, H, K]; operands: q, k, their strides, and the schedule. decayed_q, decayed_k [B, T, H, K]; tail_k
    [N * C, H, K]; total [N, H, K] float32; weights (A), query_weights (A_q) [N, H, C, C]; clean_weights (P, Pq)
    [M, H, 2, R, C]; block_weights (N, M) [M, H, 2, R, R]; cumulative [B, T, H, K] float32, log2 decays since the start
    of the chunk or block; shrunk_k [N * C, H, K], exp(-gam) k; chunk_direct [N, H], tile_direct [M, H] int32, whose
    decays leave exp(-gam) and exp(-t) in range. What only the delta rule needs is empty or unwritten without it.
    """
    s, q, heads, size, rows = schedule, operands["q"], p.heads, p.chunk_size, p.tile_rows
    tokens = (s.rows, s.length, heads, p.key_dim)
    single = {"dtype": torch.float32, "device": q.device}
    made = {
        "cumulative": torch.empty(tokens, **single),
        "decayed_q": q.new_empty(tokens),
        "decayed_k": q.new_empty(tokens if p.delta else (0,)),
        "tail_k": q.new_empty(s.chunks * size, heads, p.key_dim),
        "shrunk_k": q.new_empty(s.chunks * size, heads, p.key_dim),
        "total": torch.empty(s.chunks, heads, p.key_dim, **single),
        "weights": q.new_empty((s.chunks, heads, size, size) if p.delta else (0,)),
        "query_weights": q.new_empty(s.chunks, heads, size, size),
        "clean_weights": q.new_empty(s.tiles, heads, 2, rows, size),
        "block_weights": q.new_empty(s.tiles, heads, 2, rows, rows),
        "chunk_direct": torch.empty(s.chunks, heads, dtype=torch.int32, device=q.device),
        "tile_direct": torch.empty(s.tiles, heads, dtype=torch.int32, device=q.device),
    }
    known = operands | made | {"g": g, "g_token": g.stride(1), "g_head": g.stride(2)}
    _run(p, "channel_clean", s.chunks * heads, known)
    _run(p, "channel_block", s.tiles * heads, known)
    _run(p, "channel_prefix", s.tiles * heads, known)
    _run(p, "channel_clean_digits", s.chunks * heads, known)
    _run(p, "channel_block_digits", s.tiles * heads, known)
    _run(p, "channel_prefix_digits", s.tiles * heads, known)
    return made


def backward(
    p: Problem,
    g: Tensor,
    operands: dict[str, Any],
    schedule: TileSchedule,
    *,
    initial: bool,
    final: bool,
    frozen: bool = False,
) -> None:
    """Write grad_q, grad_k (per value head), grad_v, grad_g, grad_beta and grad_initial of the operands; padding slots
    are not written. In between grad_q and grad_k hold the gradients of decayed_q and decayed_k, and the memory of A,
    A_q, N and M their gradients. frozen: those of noisy rows alone."""
    s, q, heads, size = schedule, operands["q"], p.heads, p.chunk_size
    known = operands | decay(p, g, operands, schedule)
    known["grad_clean_weights"] = torch.empty_like(known["clean_weights"])
    _run(p, "channel_noisy_grad", s.tiles * heads, known)
    if not frozen:
        known["grad_states"] = torch.empty_like(known["states"])
        known["grad_corrected"] = q.new_empty(s.chunks * size, heads, p.value_dim)
        _run(p, "channel_chunk_grad", s.chunks * heads, known)
        p.launch(
            "states_grad", states_grad.states_grad_kernel, s.documents * heads, known, INITIAL=initial, FINAL=final
        )
        known["grad_tail"] = torch.empty_like(known["tail_k"])
        known["grad_total"] = torch.empty_like(known["total"])
        _run(p, "channel_clean_grad", s.chunks * heads, known)
    known["grad_keys"] = q.new_empty(s.tiles * size, heads, p.key_dim)
    known["grad_gates"] = torch.empty(known["grad_keys"].shape, dtype=torch.float32, device=q.device)
    _run(p, "channel_tile_finish", s.tiles * heads, known)
    _run(p, "channel_prefix_finish_digits", s.tiles * heads, known)
    _run(p, "channel_block_finish_digits", s.tiles * heads, known)
    if not frozen:
        _run(p, "channel_clean_finish", s.chunks * heads, known)
        _run(p, "channel_clean_finish_digits", s.chunks * heads, known)
    if p.l2norm:
        noisy, clean = (s.tile_first, s.tile_count), (s.chunk_token, s.chunk_length)
        for first, count in [noisy] if frozen else [clean, noisy]:
            runs = {"first_of": first, "count_of": count}
            _run(p, "channel_norm_grad", first.shape[0] * heads, known | runs)
