"""Training over a frozen model in codes: what it computes is the program over the weights that codes stand for."""

from __future__ import annotations

import re

import pytest
import torch

from flarec.errors import PropertyError, RecipeError
from flarec.passes import lower
from flarec.passes.quantize_base import check_base_quantized, quantizable
from flarec.recipe import load_recipe
from flarec.train import quantized_base
from flarec.train.adapter import adapter_of
from flarec.train.memory import Kept
from flarec.train.quantized_base import held_once, quantize_base
from tests.models import captured
from tests.train.small_run import Small, adapter_recipe
from tests.train.test_resume import everything, run

STORED, INT8 = adapter_recipe(), adapter_recipe("adapter.base=int8")


def rounded(value: torch.Tensor) -> torch.Tensor:
    """What int8 codes stand for, row by row."""
    scale = value.abs().amax(1, keepdim=True) / 127
    return torch.round(value / scale) * scale


@pytest.mark.parametrize("family", ["kimi_linear", "zamba2"])
def test_steps_are_those_over_the_weights_that_codes_stand_for(family: str) -> None:
    """To the bit, with layers computed again too: gates, experts, and layers that share their weights."""
    plain, ours = (Small(family, "vector", chosen=chosen) for chosen in (STORED, INT8))
    names = quantizable(plain.captured)
    assert names.keys() <= ours.captured.quantized.keys() and names
    for name, value in plain.program.parameters().items():
        if name in names:
            plain.start[name] = rounded(value.detach())
    expected = plain.trainer(STORED)
    log, weights = run(expected, 2), everything(expected)
    for memory in ("keep", "recompute"):
        trainer = ours.trainer(INT8.override([f"train.memory={memory}"]))
        assert run(trainer, 2) == log
        found = everything(trainer)
        assert found.keys() == weights.keys()
        assert [name for name, value in found.items() if not torch.equal(value, weights[name])] == []
    kept = {name: value for name, value in plain.program.parameters().items() if name not in names}
    own = sum(4 * value.numel() for value in expected.parameters.values())
    codes = sum(value.nbytes for held in held_once(ours.captured) for value in held.parts.values())
    assert trainer.weight_bytes == 3 * own + sum(value.nbytes for value in kept.values()) + codes


def test_the_values_are_gone_and_nothing_reads_them() -> None:
    """Of a weight the shape is left; whatever reads it finds no numbers, and the pass's checker names it."""
    set_up = Small("qwen3_5_text", "vector", chosen=INT8)
    model, program = set_up.model, set_up.program
    gone = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert gone.isnan().all() and gone.untyped_storage().nbytes() == 4
    assert "model.layers.0.mlp.up_proj.weight" not in program.parameters()
    decode = lower(set_up.captured, "decode", mask_vector=True, adapter=adapter_of(INT8))
    assert {"quantize-base"} <= {record.name for record in program.history} & {r.name for r in decode.history}
    trainer = set_up.trainer(INT8)
    with Kept(trainer.program) as kept:
        trainer.advance()
    codes = {value.data_ptr() for held in held_once(program) for value in held.parts.values()}
    assert not codes & kept.storages.keys(), "codes are weights, not what a step keeps"
    wrong = program.clone()
    node = next(n for n in wrong.graph.nodes if str(n.target).endswith("up_proj.weight_codes"))
    wrong.quantized[str(node.target)] = wrong.quantized["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(PropertyError, match=r"reads 'model.layers.*up_proj.weight_codes', which is held as codes"):
        check_base_quantized(wrong)


def test_only_what_linear_layers_alone_read_becomes_codes() -> None:
    """No router, no experts that are one tensor, nothing of the embedding or the head."""
    program = captured("jamba")
    never = re.compile(r"router|experts|A_log|conv1d|norm|embed_tokens|lm_head")
    names = quantizable(program)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in names} >= {"q_proj", "in_proj", "x_proj", "up_proj"}
    assert not [name for name in names if never.search(name)] and program.quantized == {}


def test_a_model_without_such_matrices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_base, "quantizable", lambda program: {})
    with pytest.raises(RecipeError, match=r"adapter.base = int8 finds no matrix.*set adapter.base=stored"):
        quantize_base(captured("jamba").clone(), INT8, print)


def test_recipes_that_train_the_model_have_no_codes() -> None:
    with pytest.raises(RecipeError, match=r'= "nf4" is for recipes that freeze the model.*give --recipe adapter'):
        load_recipe("draft").override(["adapter.base=nf4"])
    with pytest.raises(RecipeError, match=r'which train.shard = "parameters" cannot cut; set'):
        load_recipe("adapter").override(["adapter.base=int8", "train.shard=parameters"])
