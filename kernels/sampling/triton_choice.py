"""The choice of a token in Triton: two or three launches, the vocabulary read once or twice and not sorted.

At temperature 0 the largest logits of tiles are enough. Else tiles put their first min(top_k, `cap`) tokens into the
pool of the row; up to `cap` they leave out what lies below the k-th of the largest logits of parts of tiles, so that
a pool holds little more than the k first. The row's program compares few tokens with each other, and finds the
thresholds of top-k and top-p among many by bisection over the bits of the key. It reads the whole row itself where that
does not do: top_k above `cap`, or a top-p whose tokens fill a tile's part of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .triton_kernels import largest_kernel, tile_kernel
from .triton_row import row_kernel

POOL = 8192
MOST_PARTS = 256
"""Of a row, whose largest logits tell what the k-th largest is not below."""


@dataclass(frozen=True)
class SamplingLaunch:
    """block: tokens of a tile; cap: how many of them a tile keeps at most; parts: of a tile, each with its largest
    logit; piece: tokens that a row's program looks at together; few: tokens that it compares with each other; strip:
    how many of them with all others at once. Powers of two."""

    block: int
    cap: int
    parts: int = 1
    piece: int = 1024
    few: int = 256
    strip: int = 32
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
    tiles = SamplingLaunch(block, 1).tiles(vocab)
    parts = min(block // min(block, 64), MOST_PARTS // triton.next_power_of_2(tiles), 4)
    return SamplingLaunch(block, cap=min(block, 1 << ((POOL // tiles).bit_length() - 1)), parts=max(parts, 1))


@torch.no_grad()
def choose_rows(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor,
    out: Tensor | None, truncated: bool, sampled: bool, confidence: bool = True, per: int = 1,
    source: Tensor | None = None, launch: SamplingLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As in `torch_choice`. `truncated` is not needed: every row sees for itself."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    vocab, device = logits.shape[1], logits.device
    rows = logits.shape[0] if source is None else len(source)
    launch = launch or launch_of(vocab)
    tiles = launch.tiles(vocab)
    token = torch.empty(rows, dtype=torch.int64, device=device)
    probability = torch.empty(rows, dtype=torch.float32, device=device)
    valid = torch.empty(rows, dtype=torch.bool, device=device)
    if rows == 0:
        return token, probability, valid
    if out is not None:
        out = out.expand(logits.shape[0], vocab).view(torch.uint8)
        out = out if out.stride(1) == 1 else out.contiguous()
    strides = (logits.stride(0), 0 if out is None else out.stride(0))

    def table(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device)

    largest, held = table(tiles * launch.parts, torch.float32), table(1, torch.int32)
    total, cut = table(tiles, torch.int64), table(tiles, torch.int64)
    present, best_id, best_score = table(tiles, torch.int32), table(tiles, torch.int32), table(tiles, torch.float32)
    pool_score, pool_id = table(tiles * launch.cap, torch.float32), table(tiles * launch.cap, torch.int32)
    settings = [x.contiguous() for x in (temperature, top_k, top_p, seed, position)]
    found = (total, present, held, cut, best_score, best_id, pool_score, pool_id)
    exactly = {"num_warps": launch.warps, "enable_fp_fusion": False}
    everything = triton.next_power_of_2(tiles * launch.parts)
    sizes = {"ALL": everything, "STRIP": launch.strip, "CAP": launch.cap, "CONFIDENCE": confidence}
    largest_kernel[(rows, tiles)](
        logits, out, source, largest, best_id, held, vocab, tiles, *strides,
        BLOCK=launch.block, CHUNK=launch.chunk, PARTS=launch.parts, **exactly,
    )
    if sampled or confidence:  # at temperature 0 the largest logit is chosen
        tile_kernel[(rows, tiles)](
            logits, out, source, *settings, largest, *found, vocab, tiles, per, *strides,
            BLOCK=launch.block, CHUNK=launch.chunk, PARTS=launch.parts, **sizes, **exactly,
        )
    row_kernel[(rows,)](
        logits, out, source, *settings, largest, *found, token, probability, valid, vocab, tiles, launch.parts, per,
        *strides, BLOCK=launch.piece, TILES=triton.next_power_of_2(tiles), FEW=launch.few, **sizes, **exactly,
    )
    return token, probability, valid
