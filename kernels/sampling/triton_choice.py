"""The choice of a token in Triton: three launches, the vocabulary read twice and not sorted.

Tiles of the vocabulary keep their first min(top_k, `cap`) tokens, so that a row's program finds the threshold of top-k
and top-p among at most some thousands, by bisection over the bits of the key. It reads the whole row itself where that
does not do: top_k above `cap`, or a top-p whose tokens fill a tile's part of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .triton_kernels import largest_kernel, row_kernel, tile_kernel

POOL = 8192


@dataclass(frozen=True)
class SamplingLaunch:
    """block: tokens of a tile; cap: how many of them a tile keeps at most; piece: tokens that a row's program looks at
    together. Powers of two."""

    block: int
    cap: int
    piece: int = 1024
    warps: int = 8

    def tiles(self, vocab: int) -> int:
        chunks = -(-vocab // self.chunk)
        return -(-chunks // (self.block // self.chunk))

    @property
    def chunk(self) -> int:
        return min(self.block, 128)


def launch_of(vocab: int) -> SamplingLaunch:
    """Tiles of 4096 tokens, which fit into the registers of 8 warps; a pool of about 8192 tokens a row."""
    block = min(4096, triton.next_power_of_2(vocab))
    room = POOL // SamplingLaunch(block, 1).tiles(vocab)
    return SamplingLaunch(block, cap=min(block, 1 << (room.bit_length() - 1)))


@torch.no_grad()
def choose_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor,
    out: Tensor | None, truncated: bool, sampled: bool, confidence: bool = True, launch: SamplingLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As in `torch_choice`. `truncated` and `sampled` are not needed: every row sees for itself."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, vocab = logits.shape
    launch = launch or launch_of(vocab)
    tiles, device = launch.tiles(vocab), logits.device
    token = torch.empty(rows, dtype=torch.int64, device=device)
    probability = torch.empty(rows, dtype=torch.float32, device=device)
    valid = torch.empty(rows, dtype=torch.bool, device=device)
    if rows == 0:
        return token, probability, valid
    if out is not None:
        out = out.expand(rows, vocab).view(torch.uint8)
        out = out if out.stride(1) == 1 else out.contiguous()
    strides = (logits.stride(0), 0 if out is None else out.stride(0))
    largest, best_score = (torch.empty(rows, tiles, dtype=torch.float32, device=device) for _ in range(2))
    total, cut = (torch.empty(rows, tiles, dtype=torch.int64, device=device) for _ in range(2))
    present, kept, best_id = (torch.empty(rows, tiles, dtype=torch.int32, device=device) for _ in range(3))
    pool_score = torch.empty(rows, tiles * launch.cap, dtype=torch.float32, device=device)
    pool_id = torch.empty(rows, tiles * launch.cap, dtype=torch.int32, device=device)
    padded = triton.next_power_of_2(tiles)
    settings = [x.contiguous() for x in (temperature, top_k, top_p, seed, position)]
    found = (total, present, kept, cut, best_score, best_id, pool_score, pool_id)
    exactly = {"num_warps": launch.warps, "enable_fp_fusion": False}
    largest_kernel[(rows, tiles)](
        logits, out, largest, vocab, tiles, *strides, BLOCK=launch.block, CHUNK=launch.chunk, **exactly
    )
    tile_kernel[(rows, tiles)](
        logits, out, *settings, largest, *found, vocab, tiles, *strides,
        BLOCK=launch.block, CHUNK=launch.chunk, TILES=padded, CAP=launch.cap, CONFIDENCE=confidence, **exactly,
    )
    row_kernel[(rows,)](
        logits, out, *settings, largest, *found, token, probability, valid, vocab, tiles, *strides,
        BLOCK=launch.piece, TILES=padded, CAP=launch.cap, CONFIDENCE=confidence, **exactly,
    )
    return token, probability, valid
