"""AdamW's two moments as 8-bit codes (`optimizer.moments = 8bit`): 2.03 bytes of a parameter instead of 8.

    moment[i] = table[codes[i]] * scale[i // 256], scale the largest of a block's absolute values

Block-wise dynamic quantisation (https://arxiv.org/abs/2110.02861, sections 2.1 and 2.2), as in bitsandbytes and
torchao, whose tables, blocks and least size of a tensor are taken: `make test-quantized` compares codes with theirs. A
step decodes a stretch of codes, has `torch.optim` change weights and moments in float32, and encodes them again.

Their own steps do not fit: that of bitsandbytes (0.50) runs on GPUs alone, and that of torchao (0.18) is compiled for
every shape, of which the parts of several ranks have many, and keeps in float32 what is no multiple of a block, as such
parts are. Here blocks are counted from the beginning of the whole parameter, wherever it is cut, so that codes do not
depend on the ranks (`Stretch` cuts between blocks).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..recipe import Recipe

BLOCK = 256
"""Values that share a scale."""
LEAST = 4096
"""Elements of a parameter whose moments become codes: norms, biases and the like are little, and stay in float32."""
AT_ONCE = 1 << 24
"""Elements that are decoded at a time."""
EIGHT_BIT: Final = "8bit"
STEP, SCALE = "step", "_scale"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""As AdamW calls them. Of codes there is NAME + SCALE beside each."""
KINDS = (*MOMENTS, *(moment + SCALE for moment in MOMENTS))


def names_in_codes(recipe: Recipe, parameters: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the trained parameters whose moments are codes; their masters are float32."""
    if recipe.optimizer.moments != EIGHT_BIT:
        return frozenset()
    return frozenset(
        name for name, value in parameters.items() if value.numel() >= LEAST and value.dtype.itemsize <= 4
    )


def blocks_of(elements: int) -> int:
    return -(-elements // BLOCK)


@dataclass(frozen=True)
class MomentKind:
    """A tensor that the optimizer keeps of a parameter: one value for every `unit` elements."""

    dtype: torch.dtype
    unit: int = 1

    def shape(self, value: Tensor) -> torch.Size:
        return value.shape if self.unit == 1 else torch.Size([-(-value.numel() // self.unit)])

    def nbytes(self, elements: int) -> int:
        return -(-elements // self.unit) * self.dtype.itemsize


def kinds(dtype: torch.dtype, is_coded: bool) -> dict[str, MomentKind]:
    """What AdamW keeps of a parameter whose master has this dtype, its count of steps apart."""
    if not is_coded:
        return dict.fromkeys(MOMENTS, MomentKind(dtype))
    codes, scales = MomentKind(torch.uint8), MomentKind(torch.float32, BLOCK)
    return {**dict.fromkeys(MOMENTS, codes), **{moment + SCALE: scales for moment in MOMENTS}}


def moment_bytes(elements: int, dtype: torch.dtype, is_coded: bool) -> int:
    """Of the moments of a parameter whose master has this dtype."""
    return sum(kind.nbytes(elements) for kind in kinds(dtype, is_coded).values())


@dataclass(frozen=True)
class CodeTable:
    """What codes stand for.

    values   [256] float32, rising
    middles  [255] float32: where the nearest one is the next one
    """

    values: Tensor
    middles: Tensor

    @staticmethod
    def of(moment: str, device: torch.device) -> CodeTable:
        """0, 1, and for every power of ten from 1e-6 to 1 the middles of equal parts of 0.1 to 1 of it, each time twice
        as many. The first moment has the negative ones as well, the second one twice as many parts."""
        signed = moment == MOMENTS[0]
        values = [0.0, 1.0]
        for power in range(7):
            parts = 2**power if signed else 2 ** (power + 1)
            middles = [10.0 ** (power - 6) * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
            values += middles + ([-value for value in middles] if signed else [])
        exact = torch.tensor(sorted(values), dtype=torch.float64)
        return CodeTable(exact.float().to(device), (exact[1:] + exact[:-1]).div(2).float().to(device))

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """[n] float32 of codes [n] uint8 and scales [blocks] float32."""
        values = self.values[codes.int()]
        for rows, scale in zip(_rows(values), _split(scales, len(codes)), strict=True):
            rows.mul_(scale[:, None])
        return values

    def encode(self, values: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Into codes [n] uint8 and scales [blocks] float32 the nearest to values [n] float32, which are spoilt."""
        for rows, found, scale in zip(_rows(values), _rows(codes), _split(scales, len(values)), strict=True):
            # a block of zeros has a scale, too, by which it can be divided
            largest = torch.linalg.vector_norm(rows, torch.inf, 1).clamp_(min=torch.finfo(torch.float32).tiny)
            scale.copy_(largest)
            found.copy_(torch.bucketize(rows.div_(largest[:, None]), self.middles, out_int32=True, right=True))


def _rows(values: Tensor) -> list[Tensor]:
    """[n] as [whole blocks, 256], and as [1, rest] what is behind them."""
    whole = len(values) // BLOCK * BLOCK
    rest = [values[whole:][None]] if whole < len(values) else []
    return [values[:whole].view(-1, BLOCK), *rest] if whole else rest


def _split(scales: Tensor, elements: int) -> list[Tensor]:
    """Scales of `_rows`."""
    whole = elements // BLOCK
    rest = [scales[whole:]] if whole * BLOCK < elements else []
    return [scales[:whole], *rest] if whole else rest


@dataclass(frozen=True)
class _Piece:
    """Elements of a parameter that are changed together, by moment its codes and scales."""

    value: Tensor
    grad: Tensor
    step: Tensor
    codes: dict[str, tuple[Tensor, Tensor]]


class AdamW8bit(torch.optim.Optimizer):
    """`torch.optim.AdamW(fused=True)` that keeps the moments of some parameters as codes.

    coded: those, float32 and contiguous, whose first element begins a block. Nothing waits for the device.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], coded: Collection[nn.Parameter], *, lr: float,
        betas: tuple[float, float], eps: float, weight_decay: float,
    ) -> None:
        chosen = {id(value) for value in coded}
        every = list(parameters)
        groups = [
            {"params": [value for value in every if (id(value) in chosen) == flag], "coded": flag}
            for flag in (False, True)
        ]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)
        self.tables = {moment: CodeTable.of(moment, every[0].device) for moment in MOMENTS}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            moved = [value for value in group["params"] if value.grad is not None]
            for value in moved:
                if not self.state[value]:
                    self.state[value] = _start(value, group["coded"])
            if not group["coded"]:
                states = [self.state[value] for value in moved]
                first, second = ([state[moment] for state in states] for moment in MOMENTS)
                _adamw(group, moved, [value.grad for value in moved], first, second, [s[STEP] for s in states])
                continue
            for batch in _batches(piece for value in moved for piece in _pieces(value, self.state[value])):
                self._change(group, batch)

    def _change(self, group: Mapping[str, Any], batch: list[_Piece]) -> None:
        moments = {
            moment: [table.decode(*piece.codes[moment]) for piece in batch] for moment, table in self.tables.items()
        }
        values, grads, steps = zip(*((piece.value, piece.grad, piece.step) for piece in batch), strict=True)
        first, second = (moments[moment] for moment in MOMENTS)
        _adamw(group, list(values), list(grads), first, second, list(steps))
        for moment, table in self.tables.items():
            for value, piece in zip(moments[moment], batch, strict=True):
                table.encode(value, *piece.codes[moment])


def _start(value: Tensor, is_coded: bool) -> dict[str, Tensor]:
    made = {name: value.new_zeros(kind.shape(value), dtype=kind.dtype)
            for name, kind in kinds(value.dtype, is_coded).items()}
    return {STEP: value.new_zeros((), dtype=torch.float32), **made}


def _pieces(value: Tensor, state: Mapping[str, Tensor]) -> Iterator[_Piece]:
    """Stretches of whole blocks; AdamW counts the last one's step in the state, and those of the others in copies."""
    assert value.grad is not None
    flat, grad, total = value.detach().view(-1), value.grad.reshape(-1), value.numel()
    for start in range(0, total, AT_ONCE):
        part = slice(start, min(start + AT_ONCE, total))
        blocks = slice(start // BLOCK, blocks_of(part.stop))
        codes = {moment: (state[moment].view(-1)[part], state[moment + SCALE][blocks]) for moment in MOMENTS}
        step = state[STEP] if part.stop == total else state[STEP].clone()
        yield _Piece(flat[part], grad[part], step, codes)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Of at most `AT_ONCE` elements."""
    batch, count = list[_Piece](), 0
    for piece in pieces:
        if batch and count + len(piece.value) > AT_ONCE:
            yield batch
            batch, count = [], 0
        batch.append(piece)
        count += len(piece.value)
    if batch:
        yield batch


def _adamw(
    group: Mapping[str, Any], values: list[Any], grads: list[Any], first: list[Any], second: list[Any],
    steps: list[Any],
) -> None:
    adamw(
        values, grads, first, second, [], steps, fused=True, amsgrad=False, beta1=group["betas"][0],
        beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )


def make_optimizer(
    recipe: Recipe, parameters: Iterable[nn.Parameter], coded: Collection[nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW over float32 tensors. coded: those whose moments are codes, if the recipe has any."""
    options = recipe.optimizer
    given = {"lr": options.lr, "betas": options.betas, "eps": options.eps, "weight_decay": options.weight_decay}
    if options.moments == EIGHT_BIT:
        return AdamW8bit(parameters, coded, **given)  # type: ignore[arg-type]
    # one kernel for all tensors; the CPU and CUDA both have it
    return torch.optim.AdamW(parameters, fused=True, **given)  # type: ignore[arg-type]
