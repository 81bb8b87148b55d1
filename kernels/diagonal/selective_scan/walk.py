"""One chunk of the selective scan: the walk over its tokens and its adjoint, without a layout.

Everything is time-first: tokens [T, R, .] of R independent rows (rows of a batch, or noisy blocks). A state is kept as
[N, C], channels last, because the outputs c^T h are then sums over the rows of a contiguous matrix.

The walk takes one fused multiply-add per token over rows x states x channels. On the CPU that beats a scan in log T
wider passes, which multiplies the decays too: each product is read and written once, while it is in a cache. It also
gives the state of a token whatever chunks or decode steps its row was divided into.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """x, dt [T, R, C], b, c [T, R, N]; a token with dt = 0 changes nothing, one with c = 0 reads nothing."""

    x: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor


@dataclass(frozen=True)
class Walk:
    """decay [T, R, N, C]; states [T + 1, R, N, C]: before the first token, then after each."""

    decay: Tensor
    states: Tensor


def forward(tokens: Tokens, a: Tensor, first: Tensor, resets: tuple[Tensor, Tensor] | None = None) -> Walk:
    """Walk from the states first [R, N, C]; a [N, C]; resets: (token, row) pairs at which a row starts from zero."""
    decay = (tokens.dt[:, :, None] * a).exp_()
    if resets is not None:
        decay[resets] = 0
    states = first.new_empty(decay.shape[0] + 1, *first.shape)
    states[0] = first
    torch.mul((tokens.dt * tokens.x)[:, :, None], tokens.b[..., None], out=states[1:])
    before = states[0]
    for now, factor in zip(states[1:].unbind(), decay.unbind(), strict=True):
        before = now.addcmul_(factor, before)
    return Walk(decay, states)


@dataclass(frozen=True)
class Gradients:
    """Of x, dt, b [T, R, .], of a [N, C] and of the first states [R, N, C]."""

    x: Tensor
    dt: Tensor
    b: Tensor
    a: Tensor
    first: Tensor


def backward(grad_states: Tensor, tokens: Tokens, a: Tensor, walk: Walk) -> Gradients:
    """Gradients from grad_states [T + 1, R, N, C], those of each state from outside of the walk (overwritten)."""
    after = grad_states[-1]
    for now, factor in zip(reversed(grad_states[:-1].unbind()), reversed(walk.decay.unbind()), strict=True):
        after = now.addcmul_(factor, after)
    grad = grad_states[1:]
    grad_log = (walk.decay * walk.states[:-1]).mul_(grad)
    from_decay = (grad_log * a).sum(dim=2)
    from_input = (tokens.b[:, :, None] @ grad).squeeze(2)  # gradient of dt * x
    return Gradients(
        x=from_input * tokens.dt,
        dt=from_decay.addcmul_(from_input, tokens.x),
        b=(grad @ (tokens.dt * tokens.x)[..., None]).squeeze(3),
        a=grad_log.mul_(tokens.dt[:, :, None]).sum(dim=(0, 1)),
        first=grad_states[0],
    )


def read(states: Tensor, c: Tensor) -> Tensor:
    """y [T, R, C]: every token reads the state after itself, states [T + 1, R, N, C], with its c [T, R, N]."""
    return (c[:, :, None] @ states[1:]).squeeze(2)


def read_back(grad_y: Tensor, states: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of the states, gradient of c) of `read`."""
    grad_states = torch.empty_like(states)
    grad_states[0] = 0
    torch.mul(c[..., None], grad_y[:, :, None], out=grad_states[1:])
    return grad_states, (states[1:] @ grad_y[..., None]).squeeze(3)


def read_end(states: Tensor, c: Tensor) -> Tensor:
    """y [T, R, C]: every token of a row reads the row's last state."""
    return (c.transpose(0, 1) @ states[-1]).transpose(0, 1)


def read_end_back(grad_y: Tensor, states: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of the states, gradient of c) of `read_end`."""
    by_row = grad_y.transpose(0, 1)
    grad_states = torch.zeros_like(states)
    torch.bmm(c.permute(1, 2, 0), by_row, out=grad_states[-1])
    return grad_states, (by_row @ states[-1].mT).transpose(0, 1)
