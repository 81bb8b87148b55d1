"""Recomputation: the same bits in less memory, whatever is trained."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flarec import ops
from flarec.errors import UsageError
from flarec.ir.program import layer_of
from flarec.layout import Block, build_layout
from flarec.passes import lower
from flarec.passes.adapt_noisy_stream import AdaptNoisyStream, adapter_parameters, new_adapter
from flarec.recipe import Recipe
from flarec.train.loop import Trainer
from flarec.train.recompute import Recomputed, learning, recomputed, units_of
from tests.models import ALL_FAMILIES, PLAIN_FAMILIES, captured, tiny_tokenizer
from tests.train.small_run import Small, adapter_recipe, recipe, small

RECOMPUTE = "train.memory=recompute"
KINDS = {"kimi_linear": "experts", "zamba2": "blocks that layers share", "qwen3_5_text": "both kinds of mixers"}


def ran(run: Small, chosen: Recipe, steps: int = 2) -> tuple[Trainer, dict[str, Tensor]]:
    """A trainer after some steps, and all that they gave: losses, norms, masters and moments."""
    trainer = run.trainer(chosen)
    found: dict[str, Tensor] = {}
    for index in range(steps):
        step = trainer.advance()
        found |= {f"losses {index}": step.losses, f"norm {index}": step.gradient}
        found[f"metrics {index}"] = torch.tensor(step.read(tiny_tokenizer())["diffusion_loss"])
    state = trainer.state()
    found |= {**{f"master {k}": v.clone() for k, v in state.model.items()}, **state.optimizer}
    return trainer, found


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.parametrize("family", KINDS)
def test_a_run_that_recomputes_has_the_same_bits(family: str) -> None:
    """Two views of packed documents, in several micro batches; the graph is the one that keeps everything."""
    chosen = recipe("flare", "optimizer.batch_rows=4", "optimizer.micro_rows=2")
    (kept, theirs), (trainer, ours) = (ran(small(family), chosen.override(more)) for more in ([], [RECOMPUTE]))
    assert any(len(row.documents) > 1 for row in trainer.rows.rows(4)), "packed"
    assert_same_bits(ours, theirs)
    assert [node.name for node in trainer.program.graph.nodes] == [node.name for node in kept.program.graph.nodes]
    assert trainer.program.history == kept.program.history


@pytest.mark.parametrize("family", ["kimi_linear", "bamba"])
def test_an_adapter_that_recomputes_has_the_same_bits(family: str) -> None:
    chosen = adapter_recipe("optimizer.micro_rows=2")
    run = small(family, "vector", chosen=adapter_recipe())
    (_, theirs), (trainer, ours) = (ran(run, chosen.override(more)) for more in ([], [RECOMPUTE]))
    assert_same_bits(ours, theirs)
    assert {name.removeprefix("master ") for name in ours} >= adapter_parameters(trainer.program).keys()


def test_in_bfloat16_too() -> None:
    """Masters collect the same gradients in the same order."""
    chosen = recipe("dual", "optimizer.batch_rows=4", "optimizer.precision=bf16")
    run = small("qwen3_5_text", "auto", torch.bfloat16)
    (_, theirs), (_, ours) = (ran(run, chosen.override(more)) for more in ([], [RECOMPUTE]))
    assert_same_bits(ours, theirs)


def test_of_a_frozen_clean_stream_only_the_way_to_the_mixers_is_computed_again() -> None:
    """Nodes of clean tokens in a unit lead to a mixer; MLP and output projection of the clean stream run once."""
    chosen = adapter_recipe()
    program = small("qwen3_5_text", "vector", chosen=chosen).trainer(chosen).program
    units, wanted = units_of(program), learning(program)
    assert set(units.values()) == {f"layer_{index}" for index in range(program.config.num_hidden_layers)}
    mixers = {node for node, mixer in ops.sites(program.graph) if mixer.mixing != "none"}
    assert mixers <= wanted & units.keys()
    clean = [node for node in program.graph.nodes if "clean" in str(getattr(node.meta.get("val"), "shape", ()))]
    again, once = [node for node in clean if node in units], [node for node in clean if node not in units]

    def products(nodes: list[fx.Node]) -> set[str]:
        """Ends of the names of the modules whose matrices are multiplied with."""
        linear = torch.ops.aten.linear.default
        return {node.meta["modules"][-1][0].rpartition(".")[2] for node in nodes if node.target is linear}

    assert products(again) == {"in_proj_qkv", "in_proj_a", "in_proj_b", "q_proj", "k_proj", "v_proj"}
    assert products(once) >= {"gate_proj", "up_proj", "down_proj", "out_proj", "o_proj", "in_proj_z"}
    assert not wanted & set(clean)


def test_a_layer_that_changes_what_another_made_is_refused() -> None:
    program = small("qwen3_5_text").program.clone()
    program.module.requires_grad_()
    first, second = (
        next(n for n in program.graph.nodes if layer_of(n) == layer and n.target is torch.ops.aten.linear.default)
        for layer in (0, 1)
    )
    with program.graph.inserting_after(second):
        program.graph.call_function(torch.ops.aten.mul_.Tensor, (first, 2.0)).meta = dict(second.meta)
    with pytest.raises(UsageError, match=r"changes in place what another layer made; set train\.memory=keep"):
        units_of(program)


def test_without_autograd_a_layer_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation keeps nothing, and calls no more than the program that keeps everything."""
    trainer = small("qwen3_5_text").trainer(recipe("dual", RECOMPUTE))
    seen: list[str] = []
    forward = Recomputed.forward

    def counted(self: Recomputed, *values: object) -> tuple[object, ...]:
        seen.append("layer")
        return forward(self, *values)

    monkeypatch.setattr(Recomputed, "forward", counted)
    micro = next(iter(trainer.feed.micro_batches(trainer.feed.take(0).batches)))
    with torch.no_grad():
        results = trainer.program.results(
            micro.batch.input_ids, layout=micro.batch.layout, head_rows=micro.batch.head_rows, derived=micro.derived
        )
    assert len(seen) == 4 and not results[0].requires_grad


class Made(TorchDispatchMode):
    """Knows the memory that is taken within the context, by what is no view, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[weakref.ref[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.references += [weakref.ref(storage) for storage in made if storage.data_ptr() not in given]
        return result

    def alive(self) -> set[int]:
        found = (reference() for reference in self.references)
        return {storage.data_ptr() for storage in found if storage is not None}


@pytest.mark.parametrize("family", ["qwen3_5_text", "jamba", "recurrent_gemma"])
def test_a_layer_leaves_its_results_and_nothing_else(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between them these families have every kernel that keeps tensors for its backward pass: all of them give them to
    autograd, which drops them."""
    program = lower(captured(family), "train")
    run = recomputed(program)
    layout = build_layout([[5, 4]], [[Block(0, 2, 3), Block(1, 3, 3)]])
    left: list[int] = []
    forward = Recomputed.forward

    def looked_at(self: Recomputed, *values: object) -> tuple[object, ...]:
        with Made() as made:
            results = forward(self, *values)
        known = {x.untyped_storage().data_ptr() for x in (*values, *results) if isinstance(x, Tensor)}
        assert len(made.references) > 30
        left.append(len(made.alive() - known))
        return results

    ids, derived = torch.zeros(1, layout.length, dtype=torch.int64), program.derive(layout)
    rows = torch.arange(layout.length)
    run.results(ids, layout=layout, head_rows=rows, derived=derived)  # schedules keep what all layers read
    monkeypatch.setattr(Recomputed, "forward", looked_at)
    results = run.results(ids, layout=layout, head_rows=rows, derived=derived)
    assert results[0].requires_grad and left and not any(left)


@pytest.mark.parametrize("trained", ["model", "adapter"])
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in (*ALL_FAMILIES, *PLAIN_FAMILIES)]
)
def test_every_family_has_the_same_bits(family: str, trained: str) -> None:
    """Results, and the gradients of all that is trained."""
    program, adapter = captured(family).clone(), AdaptNoisyStream(4, 8.0) if trained == "adapter" else None
    if adapter is not None:
        made = new_adapter(program, adapter, 0)
        for parameter in made.values():
            torch.nn.init.normal_(parameter, std=0.05)
        program.extra |= made
    program = lower(program, "train", mask_vector=adapter is not None, adapter=adapter)
    before = {name: value.requires_grad for name, value in program.parameters().items()}
    try:
        for name, value in program.parameters().items():
            value.requires_grad_(adapter is None or name in program.extra)
        learned = [value for value in program.parameters().values() if value.requires_grad]
        layout = build_layout([[5, 4], [8]], [[Block(0, 2, 3), Block(1, 3, 3)], [Block(0, 4, 2, readout="causal")]])
        ids = torch.randint(0, 300, (2, layout.length), generator=torch.Generator().manual_seed(0))
        found = []
        for made_to_run in (program, recomputed(program)):
            results = made_to_run.results(ids, layout=layout, head_rows=torch.arange(ids.numel()))
            weights = torch.linspace(-1, 1, results[0].numel()).view_as(results[0])
            gradients = torch.autograd.grad((results[0] * weights).sum(), learned, allow_unused=True)
            found.append([*results, *(gradient for gradient in gradients if gradient is not None)])
    finally:
        for name, value in program.parameters().items():
            value.requires_grad_(before[name])
    assert len(found[0]) > 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
