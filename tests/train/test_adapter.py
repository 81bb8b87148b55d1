"""Training of an adapter: the model is frozen, in every dtype, and only what is the adapter's learns."""

from __future__ import annotations

import pytest
import torch

from flarec.errors import RecipeError
from flarec.passes.adapt_noisy_stream import adapter_parameters
from flarec.passes.embed_mask import PARAMETER
from flarec.recipe import load_recipe
from flarec.train.adapter import adapter_of, start_adapter
from tests.models import FAMILIES, captured, tiny_tokenizer
from tests.train.small_run import adapter_recipe, recipe, small

CHOSEN = adapter_recipe()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_learns_and_the_model_stays(family: str) -> None:
    run = small(family, "vector", chosen=CHOSEN)
    trainer = run.trainer(CHOSEN)
    steps = [trainer.advance().read(tiny_tokenizer()) for _ in range(10)]
    assert steps[-1]["diffusion_loss"] < 0.9 * steps[0]["diffusion_loss"]
    own = {*adapter_parameters(run.program), PARAMETER}
    assert trainer.parameters.keys() == own
    for name, value in run.program.parameters().items():
        assert torch.equal(value, run.start[name]) == (name not in own), name
        assert name in own or (value.grad is None and not value.requires_grad), name


@pytest.mark.parametrize("name", ["adapter", "adapter-dual"])
def test_the_recipes_learn_in_both_of_their_phases(name: str) -> None:
    """Four documents, three grids over one clean stream; the loss of the second phase is not that of the first."""
    chosen = recipe(name, "adapter.rank=4", "adapter.alpha=8", "optimizer.steps=24", "diffusion.grids=3")
    trainer = small("qwen3_5_text", "vector", chosen=CHOSEN).trainer(chosen)
    steps = [trainer.advance().read(tiny_tokenizer()) for _ in range(24)]
    lengths = [sum(step["expected_accepted"] for step in steps[at : at + 4]) / 4 for at in (0, 8, 20)]
    assert lengths == sorted(lengths) and lengths[2] > 1.1 * lengths[0]
    if name == "adapter":
        assert min(step["diffusion_loss"] for step in steps[:12]) > 0 > max(s["diffusion_loss"] for s in steps[12:])


def test_a_frozen_model_has_no_state_and_no_masters() -> None:
    run = small("qwen3_5_text", "vector", torch.bfloat16, CHOSEN)
    trainer = run.trainer(CHOSEN)
    trainer.advance()
    state = trainer.state()
    own = {*adapter_parameters(run.program), PARAMETER}
    assert state.model.keys() == own == trainer.weights.masters.keys()
    assert {name.rpartition(".")[0] for name in state.optimizer} == own
    assert all(master.dtype == torch.float32 for master in state.model.values())
    base = {name: value for name, value in run.program.parameters().items() if name not in own}
    assert {value.dtype for value in base.values()} == {torch.bfloat16}
    trained = sum(value.numel() for value in trainer.parameters.values())
    assert trainer.weight_bytes == 18 * trained + 2 * sum(value.numel() for value in base.values())


def test_a_full_run_after_an_adapter_trains_everything() -> None:
    run = small("qwen3_5_text", "vector")
    run.trainer(recipe("draft", "adapter.rank=2", "objective.ar_weight=0"))
    assert not run.program.parameters()["model.layers.0.mlp.up_proj.weight"].requires_grad
    trainer = run.trainer(recipe("draft"))
    assert trainer.parameters.keys() == run.program.parameters().keys()
    assert all(value.requires_grad for value in trainer.parameters.values())


def test_a_run_says_what_it_trains() -> None:
    lines: list[str] = []
    program = captured("jamba").clone()
    start_adapter(program, CHOSEN, 3, lines.append)
    count = sum(value.numel() for value in program.extra.values())
    assert lines[0] == f"adapter: rank 4 on 10 weights, {count:,} parameters; the model itself is frozen"
    assert any("dt_proj has no adapter" in line for line in lines)
    assert adapter_of(recipe("draft")) is None
    start_adapter(program, recipe("draft"), 3, lines.append)
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.rank=4"], r"adapter.rank = 4 keeps the clean stream as it is.*set objective.ar_weight = 0"),
        (["adapter.rank=4", "objective.ar_weight=0", "objective.diffusion_weight=0"], "leaves them out; set it to 1"),
        (["adapter.rank=4", "objective.ar_weight=0", "mask_token=row"], 'set mask_token = "vector" or "auto"'),
        (["adapter.rank=-1"], "adapter.rank"),
        (["adapter.alpha=0"], "adapter.alpha"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe("draft").override(overrides)


def test_auto_is_the_vector_over_a_frozen_model() -> None:
    assert CHOSEN.mask_token == "auto"
    assert (CHOSEN.mask_choice, recipe("draft").mask_choice) == ("vector", "auto")
