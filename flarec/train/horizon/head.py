"""The horizon head itself: two layers on a hidden row, learned from soft Gaussian targets by KL divergence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...passes.predict_horizon import PARAMETERS
from .measure import Places


def new_head(features: int, width: int, positions: int, seed: int) -> nn.Sequential:
    """A fresh head over hidden rows [n, features], float32: logits [n, positions + 1]. Equal for an equal seed,
    whatever else is random."""
    generator = torch.Generator().manual_seed(seed)
    layers = nn.Linear(features, width), nn.SiLU(), nn.Linear(width, positions + 1)
    with torch.no_grad():
        for layer in (layers[0], layers[2]):
            assert isinstance(layer, nn.Linear)
            layer.weight.normal_(0.0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
    return nn.Sequential(*layers)


def positions_of(head: nn.Sequential) -> int:
    """The largest horizon that it knows."""
    last = head[2]
    assert isinstance(last, nn.Linear)
    return last.out_features - 1


def named(head: nn.Sequential) -> dict[str, Tensor]:
    """Its parameters under the names that the pass `predict-horizon` knows."""
    state = {f"horizon.{name}": value for name, value in head.state_dict().items()}
    assert state.keys() == {*PARAMETERS}
    return state


def soft_targets(safe: Tensor, positions: int, sigma: float) -> Tensor:
    """[n, positions + 1] float32: a Gaussian around each measured number [n], over 0 .. positions."""
    distance = torch.arange(positions + 1) - safe[:, None].float()
    return torch.softmax(-0.5 * (distance / sigma) ** 2, dim=1)


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """[n] KL(target || softmax(logits)) in nats; the gradient goes to the logits."""
    known = logits.log_softmax(1)
    return (torch.xlogy(target, target) - target * known).sum(1)


def train(
    head: nn.Sequential, given: Places, *, sigma: float, steps: int, batch: int, lr: float, seed: int,
    device: torch.device, tick: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train a head in place: AdamW, a rate that falls linearly to 0. Batches are drawn by the seed alone."""
    head.to(device)
    hidden, target = given.hidden.to(device), soft_targets(given.safe, positions_of(head), sigma).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(hidden), (min(batch, len(hidden)),), generator=generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        divergence(target[chosen], head(hidden[chosen])).mean().backward()
        optimizer.step()
        tick(step + 1, steps)
    head.cpu()


@torch.no_grad()
def scores(head: nn.Sequential, given: Places, sigma: float) -> dict[str, float]:
    """How a head does on places that it was not trained on, beside the best number that is the same everywhere.

    kl: mean KL to the soft targets; too_many: share of places at which the horizon is larger than what was safe; lost:
    mean number of safe drafts that the horizon leaves out; drafts: its mean; constant_kl: of the best distribution that
    looks at nothing.
    """
    logits = head(given.hidden)
    target = soft_targets(given.safe, positions_of(head), sigma)
    horizon = logits.argmax(1)
    blind = target.mean(0, keepdim=True).clamp_min(1e-30).log().expand_as(target)
    return {
        "kl": float(divergence(target, logits).mean()),
        "constant_kl": float(divergence(target, blind).mean()),
        "drafts": float(horizon.float().mean()),
        "safe_drafts": float(given.safe.float().mean()),
        "too_many": float((horizon > given.safe).float().mean()),
        "lost": float((given.safe - horizon).clamp_min(0).float().mean()),
    }
