"""Capture: the program equals the eager model at other shapes, keeps its parameters, refuses what it does not know."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from flarec import adapters, ops
from flarec.errors import CaptureError, UsageError
from flarec.frontend import capture, check_rotary, load_model
from flarec.program import layer_of, module_of, source_line
from tests.models import FAMILIES, captured, shared_model, tiny_checkpoint, tiny_model

MIXERS = {
    "qwen3_5_text": {"short_conv": 3, "linear_attention": 3, "softmax_attention": 1, "moe_experts": 0},
    "kimi_linear": {"short_conv": 2, "linear_attention": 2, "softmax_attention": 2, "moe_experts": 3},
    "bamba": {"short_conv": 2, "linear_attention": 2, "softmax_attention": 2, "moe_experts": 0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_op_per_mixer_and_expert_layer(family: str) -> None:
    counts = captured(family).op_counts()
    assert {name: counts[f"flarec.{name}"] for name in MIXERS[family]} == MIXERS[family]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 9), (3, 21)])
def test_forward_and_gradients_equal_eager(family: str, shape: tuple[int, int]) -> None:
    """At a batch and a length other than those of the example that was traced."""
    program, model = captured(family), shared_model(family)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, shape, generator=generator)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    weight = torch.randn(*shape, model.config.vocab_size, generator=generator)
    parameters = dict(model.named_parameters())

    def gradients(logits: torch.Tensor) -> list[torch.Tensor | None]:
        return list(torch.autograd.grad((logits * weight).mean(), list(parameters.values()), allow_unused=True))

    eager = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    ours = program(ids, position_ids=positions)
    assert (ours - eager).abs().max() <= 1e-4 * eager.abs().max()
    for name, a, b in zip(parameters, gradients(ours), gradients(eager), strict=True):
        if b is None:
            assert a is None or not a.any(), name
            continue
        assert a is not None, f"{name} lost its gradient"
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-9, name


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_the_models_own(family: str) -> None:
    program, model = captured(family), shared_model(family)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    assert program.parameters().keys() <= theirs.keys()
    assert {id(p) for p in program.parameters().values()} == {id(p) for p in theirs.values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny_model(family)
    before = (model.config._attn_implementation, model.config.use_cache, model.training)
    ids = torch.arange(3, 12)[None]
    logits = model(input_ids=ids).logits
    capture(model)
    assert (model.config._attn_implementation, model.config.use_cache, model.training) == before
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_nodes_know_where_they_come_from() -> None:
    program = captured("qwen3_5_text")
    node = program.calls(ops.SOFTMAX_ATTENTION)[0]
    assert layer_of(node) == 3
    assert module_of(node) == ("model.layers.3.self_attn", "Qwen3_5Attention")
    assert "modeling_qwen3_5.py:" in source_line(program.calls(ops.SHORT_CONV)[0])


def test_meta_capture_needs_no_weights() -> None:
    """The 2B shape, from its configuration alone; names as in the checkpoint."""
    config = Qwen3_5TextConfig(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
        head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128,
        linear_value_head_dim=128, vocab_size=248320, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM._from_config(config, dtype=torch.bfloat16)
    start = time.perf_counter()
    program = capture(model)
    assert time.perf_counter() - start < 60
    assert program.dtype == torch.bfloat16
    assert program.op_counts()["flarec.linear_attention"] == 18
    assert program.parameters().keys() == dict(model.named_parameters()).keys()


def test_meta_capture_from_a_directory(tmp_path) -> None:
    path = tiny_checkpoint(tmp_path, "bamba")
    program = capture(path, device="meta")
    assert all(p.device.type == "meta" for p in program.parameters().values())
    assert program.op_counts() == captured("bamba").op_counts()


def test_run_dtype(tmp_path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen3_5_text")
    program = capture(path, dtype=torch.bfloat16)
    positions = torch.arange(8)[None]
    assert program(torch.arange(3, 11)[None], position_ids=positions).dtype == torch.bfloat16


def test_unknown_family_names_the_row_to_add() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(CaptureError, match=r"'llama' has no adapter row.*FAMILIES in flarec/adapters\.py"):
        capture(model)


def test_unknown_mixer_names_class_layer_and_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class StrangeMixer(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return hidden_states * 0.5

    model = tiny_model("qwen3_5_text")
    model.model.layers[1].linear_attn = StrangeMixer()
    with pytest.raises(CaptureError, match=r"layer 1 .*StrangeMixer.*row 'qwen3_5_text' in flarec/adapters\.py"):
        capture(model)


def test_renamed_function_is_an_error_not_a_silent_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    row = adapters.FAMILIES["bamba"]
    functions = dict(row.functions) | {"function_of_tomorrow": adapters.short_conv_hook}
    monkeypatch.setitem(adapters.FAMILIES, "bamba", adapters.Family(row.model_type, row.mixers, functions))
    with pytest.raises(CaptureError, match="has no function_of_tomorrow"):
        capture(tiny_model("bamba"))


def test_hook_refuses_what_no_op_covers() -> None:
    x = torch.zeros(1, 2, 4)
    with pytest.raises(CaptureError, match="initial_states"):
        adapters.short_conv_hook(x, torch.zeros(2, 4), initial_states=x)
    with pytest.raises(CaptureError, match="not causal"):
        q = torch.zeros(1, 1, 2, 4)
        adapters.attention_hook(nn.Linear(1, 1), q, q, q, None, is_causal=False)


def test_no_model_directory(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"not a model directory \(no config.json\)"):
        load_model(tmp_path, None, "cpu")


def test_missing_weights_are_an_error_not_random_numbers(tmp_path) -> None:
    path = tiny_checkpoint(tmp_path, "bamba")
    state = load_file(path / "model.safetensors")
    names = [name for name in state if "layers.2" in name] + ["model.final_layernorm.weight"]
    for name in names:
        del state[name]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    words = rf"bamba holds no weights for model\.final_layernorm\.weight, model\.layers\.2.* and {len(names) - 3} more"
    with pytest.raises(UsageError, match=words):
        load_model(path, None, "cpu")


def test_tied_weights_are_not_missing(tmp_path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen3_5_text", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    model = load_model(path, None, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_zero_rotary_buffers_are_noticed() -> None:
    model = tiny_model("qwen3_5_text")
    model.model.rotary_emb.inv_freq.zero_()
    with pytest.raises(CaptureError, match="inv_freq"):
        check_rotary(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("op", ["linear_attention", "short_conv", "softmax_attention"])
def test_negative_control(family: str, op: str) -> None:
    """A mixer that is one percent off shows in the logits: the equality test above can fail."""
    program = captured(family).clone()
    for node in program.calls(getattr(torch.ops.flarec, op).default):
        with program.graph.inserting_after(node):
            scaled = program.graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.01))
        for user in list(node.users):
            if user is not scaled:
                user.replace_input_with(node, scaled)
    program.finish()
    ids, positions = torch.arange(3, 17)[None], torch.arange(14)[None]
    exact = captured(family)(ids, position_ids=positions)
    assert (program(ids, position_ids=positions) - exact).abs().max() > 1e-4 * exact.abs().max()
