"""What is diffused: kinds of noisy blocks, their noise and their losses, as sections of a recipe.

Contract: docs/semantics.md sections 1 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from ..base.fields import LARGEST_BLOCK, key
from ..errors import RecipeError
from .keys import coerce, parse_value, types_of
from .phases import phases, value_at

Readout = Literal["block_end", "causal"]
Loss = Literal["ce", "kl", "tv", "el"]
SlotWeights = Literal["uniform", "accept-until-fail"]


@dataclass(frozen=True)
class Section:
    """Base of all sections: coerces and checks every key on construction. `path` is the section's dotted name."""

    path: ClassVar[str] = ""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        hints = types_of(cls)
        for item in fields(self):
            name = f"{self.path}.{item.name}" if self.path else item.name
            value = coerce(name, getattr(self, item.name), hints[item.name], item.metadata)
            object.__setattr__(self, item.name, value)


@dataclass(frozen=True)
class BlockKind(Section):
    """How a noisy block is masked, read and supervised."""

    path: ClassVar[str] = "diffusion"
    mask: Literal["random", "all"] = key(
        "random", "random: a mask rate per block, uniform on [0, 1], stratified; all: every position masked"
    )
    views: Literal[1, 2] = key(2, "noisy copies of a block; with 2 the second view masks the complement of the first")
    supervise: Literal["masked-input", "masked-target", "masked-both"] = key(
        "masked-input",
        "which noisy positions count: those whose own token is masked (published), those that cannot see the token "
        "they predict, or those for which both hold; a target with two signals gives each the weight 1/2",
    )
    readout: Literal["block_end", "causal"] = key(
        "block_end", "what a noisy token reads of its own block: all of it (block_end), or up to itself (causal)"
    )
    loss: Loss = key(
        "ce",
        "ce: cross entropy with the next token; the others against the clean stream's distribution of the same target: "
        "kl, KL divergence; tv, total variation; el, minus the expected accepted length of the block",
    )
    slot_weights: SlotWeights = key(
        "uniform",
        "accept-until-fail: a slot's loss weighs as much as all earlier slots of its block are likely to be accepted, "
        "at least 0.1",
    )
    earlier_losses: tuple[str, ...] = key(
        (), 'losses before `loss`, each up to a fraction of the steps: ["kl:0.5"] is KL for the first half of the run'
    )
    wrong_tokens: float = key(
        0.0,
        "restoration noise: the share of visible positions that show a token of another place of the step's texts, "
        "drawn at random; such a position counts as a masked one",
        low=0, high=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_chain()
        if self.mask == "all" and self.views == 2:
            raise RecipeError(
                f'{self.path}.views = 2 needs {self.path}.mask = "random": the complement of a fully masked view '
                f"masks nothing; set {self.path}.views = 1"
            )
        if self.mask == "all" and self.wrong_tokens:
            raise RecipeError(
                f'{self.path}.wrong_tokens = {self.wrong_tokens} needs {self.path}.mask = "random": a fully masked '
                "block shows no token that could be wrong"
            )

    def _check_chain(self) -> None:
        """What depends on the earlier slots of a block needs blocks as decoding drafts them."""
        losses = {self.loss, *(loss for loss, _ in self._losses())}
        reason = 'loss "el"' if "el" in losses else f'slot_weights = "{self.slot_weights}"'
        if self.mask == "random" and ("el" in losses or self.slot_weights != "uniform"):
            raise RecipeError(
                f'{self.path}: {reason} needs {self.path}.mask = "all": slots are accepted one after the other only '
                "where all are drafted"
            )
        if losses == {"el"} and self.slot_weights != "uniform":
            raise RecipeError(
                f'{self.path}.loss = "el" weighs the slots by itself; set {self.path}.slot_weights = "uniform"'
            )

    def _losses(self) -> list[tuple[Loss, float]]:
        path = f"{self.path}.earlier_losses"

        def read(text: str) -> Loss:
            loss: Loss = coerce(path, text, Loss, {})
            return loss

        return phases(path, self.earlier_losses, read)

    def _now(self, step: int, steps: int) -> dict[str, Any]:
        """The keys that a phase decides."""
        loss = value_at(self._losses(), self.loss, step, steps)
        return {
            "loss": loss, "earlier_losses": (), "slot_weights": "uniform" if loss == "el" else self.slot_weights,
        }


@dataclass(frozen=True)
class SecondKind(BlockKind):
    """A second kind of block, drawn instead of the first with some probability. Its defaults are those of `draft`."""

    path: ClassVar[str] = "diffusion.second"
    probability: float = key(
        0.0, "probability that a block is of this second kind instead of the first; 0 switches it off", low=0, high=1
    )
    mask: Literal["random", "all"] = key("all", "as diffusion.mask, for the second kind")
    views: Literal[1, 2] = key(1, "as diffusion.views, for the second kind")
    supervise: Literal["masked-input", "masked-target", "masked-both"] = key(
        "masked-input", "as diffusion.supervise, for the second kind"
    )
    readout: Literal["block_end", "causal"] = key("causal", "as diffusion.readout, for the second kind")
    loss: Loss = key("kl", "as diffusion.loss, for the second kind")
    slot_weights: SlotWeights = key("uniform", "as diffusion.slot_weights, for the second kind")
    earlier_losses: tuple[str, ...] = key((), "as diffusion.earlier_losses, for the second kind")
    wrong_tokens: float = key(0.0, "as diffusion.wrong_tokens, for the second kind", low=0, high=1)


@dataclass(frozen=True)
class Diffusion(BlockKind):
    """The noisy blocks of training: their size, their kind, and an optional second kind."""

    block_size: int = key(
        4, "noisy positions per block; the publication leaves it open, 4 is our choice", low=1,
        high=LARGEST_BLOCK,
    )
    earlier_block_sizes: tuple[str, ...] = key(
        (),
        "block sizes before `block_size`, each up to a fraction of the steps: "
        '["1:0.25", "2:0.5"] starts with blocks of 1 for a quarter of the run',
    )
    grids: int = key(1, "block grids over each response, shifted against each other, with one clean stream", low=1)
    grid_offset: Literal["first", "random"] = key(
        "first",
        "first: the first grid starts at the first loss token; random: all grids of a response start up to "
        "block_size - 1 positions later, drawn anew for every step",
    )
    span_entropy: float = key(
        0.0,
        "above 0 blocks are spans of variable length: up to block_size positions, and so many that the clean stream's "
        "next-token entropies of their tokens add up to at most so many nats (at least one position); causal readout "
        "only. 0: every block has block_size positions",
        low=0,
    )
    second: SecondKind = field(default_factory=SecondKind)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._block_sizes()
        if self.grids > self.block_size:
            raise RecipeError(
                f"{self.path}.grids = {self.grids}, but blocks of {self.block_size} can start at {self.block_size} "
                f"places only; lower it, or raise {self.path}.block_size"
            )
        if self.span_entropy and any(kind.readout != "causal" for _, kind in self.kinds):
            raise RecipeError(
                f'{self.path}.span_entropy = {self.span_entropy} needs readout = "causal" of every kind: where '
                "a row reads its whole block, a span's length tells what is not known in decoding"
            )

    def block_sizes(self) -> list[tuple[str, int]]:
        """(key, size) of every size that blocks have during a run."""
        earlier = [(f"{self.path}.earlier_block_sizes", size) for size, _ in self._block_sizes()]
        return [(f"{self.path}.block_size", self.block_size), *earlier]

    def _block_sizes(self) -> list[tuple[int, float]]:
        path, metadata = f"{self.path}.earlier_block_sizes", type(self).__dataclass_fields__["block_size"].metadata

        def read(text: str) -> int:
            size: int = coerce(path, parse_value(path, text, int), int, metadata)
            return size

        return phases(path, self.earlier_block_sizes, read)

    def at(self, step: int, steps: int) -> Diffusion:
        """What holds in optimizer step `step`, counted from 0, of `steps`: without phases."""
        size = value_at(self._block_sizes(), self.block_size, step, steps)
        second = replace(self.second, **self.second._now(step, steps))
        return replace(
            self, **self._now(step, steps), block_size=size, earlier_block_sizes=(), grids=min(self.grids, size),
            second=second,
        )

    @property
    def kinds(self) -> tuple[tuple[float, BlockKind], ...]:
        """(probability, kind) of the kinds that can be drawn, first kind first; probabilities add to 1."""
        pairs: tuple[tuple[float, BlockKind], ...] = (
            (1.0 - self.second.probability, self),
            (self.second.probability, self.second),
        )
        return tuple(pair for pair in pairs if pair[0] > 0)
