"""Parameters that are whole only while their layer runs: the bits of a run that has them all, two layers at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flarec.ir.program import Program
from flarec.recipe import Recipe
from flarec.train.gathering import GatheredWeights, layers_of
from flarec.train.loop import Trainer
from flarec.train.memory import choose, cuts_parameters, state_bytes
from flarec.train.ranks.group import Ranks
from tests.train.small_run import Small, adapter_recipe, recipe, small

SHARD = "train.shard=parameters"


class Noting(Ranks):
    """Notes at every gathering which layers are in memory, and the sums that begin."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.trainer: Trainer | None = None
        self.notes: list[tuple[int, ...]] = []
        self.sums = 0

    def all_gather(self, whole: Tensor, part: Tensor) -> None:
        super().all_gather(whole, part)
        if self.trainer is not None:
            self.notes.append(in_memory(self.trainer))

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> Any:
        self.sums += 1
        return super().reduce_scatter(part, whole)


def in_memory(trainer: Trainer) -> tuple[int, ...]:
    """Layers of which a parameter has memory."""
    weights = trainer.weights
    assert isinstance(weights, GatheredWeights)
    return tuple(
        layer for layer, values in weights.values.items()
        if any(value.untyped_storage().nbytes() for value in values.values())
    )


def made(run: Small, chosen: Recipe) -> tuple[Trainer, Noting]:
    ranks = Noting()
    trainer = run.trainer(chosen.override([SHARD]), ranks=ranks)
    ranks.trainer = trainer
    return trainer, ranks


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Losses and gradient sums of one step."""
    batches = trainer.feed.take(0).batches
    trainer.weights.forget()
    losses, _, _ = trainer.accumulate(batches)
    found = {"losses": losses}
    if isinstance(trainer.weights, GatheredWeights):
        for bucket in trainer.weights.buckets:
            for span in bucket.spans:
                empty = torch.zeros(trainer.parameters[span.name].shape, dtype=bucket.wide)
                found.setdefault(span.name, empty).view(-1)[span.start : span.stop] = bucket.grad[span.place]
    else:
        masters = trainer.weights.masters
        found |= {name: torch.zeros_like(m) if m.grad is None else m.grad for name, m in masters.items()}
    return found


@pytest.mark.parametrize(
    ("family", "dtype", "chosen"),
    [
        ("qwen3_5_text", torch.bfloat16, recipe("flare", "train.memory=keep")),
        ("qwen3_5_text", torch.bfloat16, recipe("flare", "train.memory=recompute")),
        ("kimi_linear", torch.float32, adapter_recipe("train.memory=keep")),
        ("kimi_linear", torch.float32, adapter_recipe("train.memory=recompute")),
        ("zamba2", torch.float32, recipe("draft", "train.memory=keep")),
    ],
    ids=["flare", "flare again", "adapter", "adapter again", "layers that share blocks"],
)
def test_losses_and_gradients_are_those_of_whole_parameters(family: str, dtype: torch.dtype, chosen: Recipe) -> None:
    """Two micro batches; on one rank, whose part is the whole."""
    run = small(family, "vector", chosen=adapter_recipe()) if chosen.adapter.rank else small(family, "auto", dtype)
    theirs, (trainer, _) = gradients(run.trainer(chosen)), made(run, chosen)
    ours = gradients(trainer)
    assert ours.keys() == theirs.keys() and any(bool(value.any()) for value in ours.values())
    assert [name for name, value in theirs.items() if not torch.equal(value, ours[name])] == []
    assert in_memory(trainer) == ()


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_there_are_two_layers_at_a_time_in_one_order(memory: str) -> None:
    """Forward the next one is gathered ahead, backward the one before; the last one stays between the two ways."""
    chosen = recipe("flare", "optimizer.micro_rows=2", f"train.memory={memory}")
    trainer, ranks = made(small("qwen3_5_text", "auto", torch.bfloat16), chosen)
    gradients(trainer)  # the first forward pass has all parameters, as they were loaded
    ranks.notes.clear()
    ranks.sums = 0
    gradients(trainer)
    told = list(dict.fromkeys(ranks.notes))
    assert told == [(0,), (0, 1), (1, 2), (2, 3)], "and backward (2, 3), (1, 2), (0, 1)"
    changes = [now for before, now in zip([(), *ranks.notes], [*ranks.notes, ()], strict=True) if now and before != now]
    assert changes == [(0,), (0, 1), (1, 2), (2, 3), (1, 2), (0, 1)]
    assert isinstance(trainer.weights, GatheredWeights) and ranks.sums == len(trainer.weights.buckets)


def test_a_forward_pass_without_gradients_leaves_nothing() -> None:
    trainer, _ = made(small("qwen3_5_text", "auto", torch.bfloat16), recipe("flare"))
    micro = next(iter(trainer.feed.micro_batches(trainer.feed.take(0).batches)))

    def run(program: Program) -> Tensor:
        batch = micro.batch
        given: dict[str, Any] = {"layout": batch.layout, "head_rows": batch.head_rows, "derived": micro.derived}
        return program.results(batch.input_ids, **given)[0]

    with torch.no_grad():
        first = run(trainer.program)
        assert in_memory(trainer) == ()
        assert torch.equal(run(trainer.program), first) and in_memory(trainer) == ()
        with trainer.whole():
            assert in_memory(trainer) == (0, 1, 2, 3)
            assert torch.equal(run(small("qwen3_5_text", "auto", torch.bfloat16).program), first), "read by another one"
    assert in_memory(trainer) == ()


def test_what_others_made_of_the_parameters_is_out_of_date_behind_a_step() -> None:
    """Whoever keeps something that is computed from them looks at their versions."""
    trainer, _ = made(small("qwen3_5_text", "auto", torch.bfloat16), recipe("flare"))
    layers = layers_of(trainer.program)
    before = {name: value._version for name, value in trainer.parameters.items()}
    trainer.advance()
    assert all(trainer.parameters[name]._version > before[name] for name in layers)


def test_parameters_of_several_layers_or_none_stay_whole() -> None:
    program = small("zamba2").program
    layers, every = layers_of(program), program.parameters()
    assert {"model.embed_tokens.weight", "model.final_layernorm.weight"} <= every.keys() - layers.keys()
    shared = [name for name in every.keys() - layers.keys() if "shared_transformer" in name]
    assert shared and all(f"layers.{layer}." in name for name, layer in layers.items() if "mamba" in name)


def test_auto_cuts_them_where_whole_ones_would_take_half_of_the_memory() -> None:
    run = small("qwen3_5_text", "auto", torch.bfloat16)
    state = state_bytes(run.program, recipe("flare"), 2)
    for shard, free, ranks, expected in (
        ("auto", 3 * state, 2, False), ("auto", int(1.9 * state), 2, True), ("auto", None, 2, False),
        ("auto", state // 2, 1, False), ("parameters", 10**15, 2, True), ("parameters", 10**15, 1, False),
        ("optimizer", state // 2, 2, False),
    ):
        chosen = recipe("flare", f"train.shard={shard}", "train.memory=keep")
        assert cuts_parameters(run.program, chosen, ranks, free) == expected, (shard, free, ranks)
        if free is not None:
            applied = choose(run.program, chosen, run.mask, ranks, free=free).apply(chosen)
            assert applied.train.shard == ("parameters" if expected else "optimizer")


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_memory_counts_parts(name: str) -> None:
    """With parts a rank has less by a half of its layers, and two layers of a moment more."""
    adapter = name == "adapter"
    chosen = adapter_recipe() if adapter else recipe("flare")
    run = small("kimi_linear", "vector", chosen=chosen) if adapter else small("qwen3_5_text", "auto", torch.bfloat16)
    every, layers = run.program.parameters(), layers_of(run.program)
    by_layer: dict[int, int] = {}
    for layer_name, layer in layers.items():
        by_layer[layer] = by_layer.get(layer, 0) + every[layer_name].nbytes
    total, pair = sum(by_layer.values()), sum(sorted(by_layer.values())[-2:])
    frozen = sum(every[n].nbytes for n in layers if n not in run.program.extra) if adapter else 0
    found = state_bytes(run.program, chosen, 2, cut=True) - state_bytes(run.program, chosen, 2)
    assert found == pytest.approx(frozen / 2 - total + pair, abs=2)
