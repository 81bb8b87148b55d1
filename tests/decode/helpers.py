"""Random cases for the decoders."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from flarec.base.generation import GenerationOptions
from flarec.decode import Engine
from flarec.decode.policy import CAUSAL, Drafting, DraftPolicy

from .fake_model import FakeModel, FakeProgram


class HeldPolicy(DraftPolicy):
    """Chooses what it is told to."""

    def __init__(self, choices: Sequence[Drafting], held: Drafting = CAUSAL) -> None:
        super().__init__(choices)
        self.held = held

    def next(self, rows: int) -> Drafting:
        self.drafting = self.held
        return self.held


class RandomPolicy(DraftPolicy):
    """Chooses anything, and keeps it for a few steps."""

    def __init__(self, choices: Sequence[Drafting], rng: random.Random) -> None:
        super().__init__(choices)
        self.rng = rng
        self.used: list[Drafting] = []

    def next(self, rows: int) -> Drafting:
        if self.rng.random() < 0.6:
            self.drafting = self.rng.choice(self.choices)
        self.used.append(self.drafting)
        return self.drafting


def hold(engine: Engine, policy: DraftPolicy) -> DraftPolicy:
    """Let a policy decide in all lanes of an engine."""
    engine.__dict__["_policy"] = lambda key, placed=(): policy
    return policy


def make_engine(
    model: FakeModel,
    size: int | None = 3,
    *,
    readout: str = "causal",
    eos: Collection[int] = (),
    max_positions: int = 10_000,
) -> tuple[Engine, FakeProgram]:
    program = FakeProgram(model)
    wide = FakeProgram(model, calls=program.calls, horizon=size)
    engine = Engine(
        program,
        mask_token_id=model.mask if size is not None else None,
        block_size=size,
        readouts={"ar-trust": readout, "diffusion-trust": readout},
        eos_ids=eos,
        max_positions=max_positions,
        suppress=[model.mask],
        horizon=None if size is None else lambda: wide,
    )
    return engine, program


def random_options(rng: random.Random) -> GenerationOptions:
    return GenerationOptions(
        temperature=rng.choice([0.0, 0.0, 0.5, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 3, 8]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.4]),
        seed=rng.randrange(2**63),
    )


def random_prompts(rng: random.Random, model: FakeModel, count: int, longest: int = 12) -> list[list[int]]:
    return [[rng.randrange(model.mask) for _ in range(rng.randint(1, longest))] for _ in range(count)]
