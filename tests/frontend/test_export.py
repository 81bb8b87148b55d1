"""Capture: the program equals the eager model at other shapes, keeps its parameters, refuses what it does not know."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from flarec import ops
from flarec.errors import CaptureError, UsageError
from flarec.frontend import families
from flarec.frontend.export import capture, check_rotary, load_model
from flarec.frontend.family import Family
from flarec.frontend.hooks.functions import short_conv_hook
from flarec.frontend.tiny import TINY, TinyModel
from flarec.ir.pipeline import run_pipeline
from flarec.ir.program import Program, layer_of, module_of, source_line
from flarec.passes.canonicalize import Canonicalize
from flarec.passes.properties import CHECKS
from tests.counting import CallCounter, calls_of
from tests.models import ALL_FAMILIES, FAMILIES, PLAIN_FAMILIES, captured, shared_model, tiny_checkpoint, tiny_model

MIXERS = {
    "qwen3_5_text": {"short_conv": 3, "linear_attention": 3, "softmax_attention": 1},
    "qwen3_5_moe_text": {"short_conv": 1, "linear_attention": 1, "softmax_attention": 1, "moe_experts": 2},
    "qwen3_next": {"short_conv": 1, "linear_attention": 1, "softmax_attention": 1, "moe_experts": 2},
    "olmo_hybrid": {"short_conv": 1, "linear_attention": 1, "softmax_attention": 1},
    "kimi_linear": {"short_conv": 2, "linear_attention": 2, "softmax_attention": 2, "moe_experts": 3},
    "bailing_hybrid": {"short_conv": 1, "linear_attention": 1, "softmax_attention": 1, "moe_experts": 1},
    "minimax": {"linear_attention": 1, "softmax_attention": 1, "moe_experts": 2},
    "bamba": {"short_conv": 2, "linear_attention": 2, "softmax_attention": 2},
    "falcon_h1": {"short_conv": 2, "linear_attention": 2, "softmax_attention": 2},
    "nemotron_h": {"short_conv": 2, "linear_attention": 2, "softmax_attention": 1, "moe_experts": 1},
    "granitemoehybrid": {"short_conv": 1, "linear_attention": 1, "softmax_attention": 1, "moe_experts": 2},
    "zamba2": {"short_conv": 3, "linear_attention": 3, "softmax_attention": 2},
    "jamba": {"short_conv": 1, "selective_scan": 1, "softmax_attention": 1, "moe_experts": 1},
    "zamba": {"short_conv": 3, "selective_scan": 6, "softmax_attention": 2},
    "zaya": {"short_conv": 6, "softmax_attention": 2, "moe_experts": 2},
    "mamba2": {"short_conv": 2, "linear_attention": 2},
    "mamba": {"short_conv": 2, "selective_scan": 2},
    "falcon_mamba": {"short_conv": 2, "selective_scan": 2},
    "lfm2": {"short_conv": 1, "softmax_attention": 1},
    "lfm2_moe": {"short_conv": 1, "softmax_attention": 1, "moe_experts": 1},
    "lfm3": {"short_conv": 1, "softmax_attention": 2},
    "recurrent_gemma": {"short_conv": 2, "gated_recurrence": 2, "bounded_sqrt": 2, "softmax_attention": 1},
    "llama": {"softmax_attention": 2},
    "mistral": {"softmax_attention": 2},
    "qwen3": {"softmax_attention": 2},
    "qwen3_moe": {"softmax_attention": 2, "moe_experts": 2},
    "gemma2": {"softmax_attention": 2},
    "gemma3_text": {"softmax_attention": 2},
}
EVERY = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in (*ALL_FAMILIES, *PLAIN_FAMILIES)]

_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_local_experts": 4}
_LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16}
_SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0,
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere2": ("Cohere2", {"sliding_window": 12}),
    "deepseek_v3": ("DeepseekV3", {
        **_EXPERTS, **_LATENT, "num_key_value_heads": 4, "q_lora_rank": 32, "n_routed_experts": 4, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1,
    }),
    "glm4": ("Glm4", {"head_dim": 16}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoX", {}),
    "granitemoe": ("GraniteMoe", {**_EXPERTS, "residual_multiplier": 0.5}),
    "mixtral": ("Mixtral", _EXPERTS),
    "olmo3": ("Olmo3", {"sliding_window": 12}),
    "phi3": ("Phi3", {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    "smollm3": ("SmolLM3", {}),
    "starcoder2": ("Starcoder2", {}),
}
"""Plain softmax models beyond `families.PLAIN`, captured and compared only."""


def traced(family: str) -> Program:
    """`captured(family)` where this process traced it, as the group of a family nearly always does: never a graph that
    another process left in the program cache."""
    program = captured(family)
    return program if program.history[0].step == "capture()" else capture(shared_model(family))


@contextlib.contextmanager
def eager(model: Any) -> Iterator[Any]:
    """The model with attention written out: the fused kinds leave soft caps out."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def assert_equal_to_eager(program: Program, model: Any, rows: int, length: int) -> None:
    """Logits, and the gradient of every parameter under its own name, for a loss over all logits."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (rows, length), generator=generator)
    positions = torch.arange(length).expand(rows, length).contiguous()
    weight = torch.randn(rows, length, model.config.vocab_size, generator=generator)
    parameters = dict(model.named_parameters())
    assert program.parameters().keys() <= dict(model.named_parameters(remove_duplicate=False)).keys()

    def gradients(logits: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad((logits * weight).mean(), list(parameters.values()), allow_unused=True))

    with eager(model):
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    wanted = gradients(expected)
    steps = (program, run_pipeline(program, [Canonicalize()], CHECKS))
    for step in steps:
        logits = step(ids, position_ids=positions)
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
        for name, a, b in zip(parameters, gradients(logits), wanted, strict=True):
            if b is None:
                assert a is None or not a.any(), name
                continue
            assert a is not None, f"{name} lost its gradient"
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-9, name


def test_every_row_has_a_tiny_configuration() -> None:
    assert set(TINY) == {*families.FAMILIES, *families.PLAIN} == set(MIXERS)
    assert not set(families.FAMILIES) & set(families.PLAIN)


@pytest.mark.parametrize("family", EVERY)
def test_one_op_per_mixer_and_expert_layer(family: str) -> None:
    counts = traced(family).op_counts()
    ours = {name.removeprefix("flarec."): n for name, n in counts.items() if name.startswith("flarec.")}
    assert ours == MIXERS[family]


@pytest.mark.parametrize("family", EVERY)
def test_forward_and_gradients_equal_eager(family: str) -> None:
    """At a batch and a length other than the traced example's, beyond the chunks and windows of the models.

    Also behind `canonicalize`, which inlines no-grad regions and removes detachments.
    """
    assert_equal_to_eager(traced(family), shared_model(family), 3, 37)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_short_row_equals_eager(family: str) -> None:
    assert_equal_to_eager(traced(family), shared_model(family), 1, 9)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_other_softmax_models_equal_eager(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, values = OTHERS[family]
    head = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    monkeypatch.setitem(TINY, family, TinyModel(f"{prefix}Config", f"{prefix}{head}", _SMALL | values))
    model = tiny_model(family)
    assert_equal_to_eager(capture(model), model, 3, 37)


@pytest.mark.parametrize("family", EVERY)
def test_parameters_are_the_models_own(family: str) -> None:
    program, model = captured(family), shared_model(family)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    assert program.parameters().keys() <= theirs.keys()
    for name, parameter in program.parameters().items():
        assert parameter is theirs[name]
    unused = {"zamba2": "_adapter_list."}  # an adapter for every layer in each shared block, most of them never called
    for name in theirs.keys() - program.parameters().keys():
        assert any(theirs[name] is p for p in program.parameters().values()) or unused.get(family, "!") in name, name


@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear", "minimax", "recurrent_gemma"])
def test_capture_leaves_the_model_as_it_was(family: str) -> None:
    model = tiny_model(family)
    model.lm_head.weight.requires_grad_(False)
    ids = torch.arange(3, 12)[None]

    def state() -> list[object]:
        settings = [getattr(model.config, x, None) for x in ("_attn_implementation", "use_cache")]
        classes = {type(module): dict(vars(type(module))) for module in model.modules()}
        module = vars(__import__("sys").modules[type(model).__module__])
        replaced = {name: module.get(name) for name in families.FAMILIES[family].functions}
        flags = [p.requires_grad for p in model.parameters()]
        return [settings, classes, replaced, flags, model.training, list(model._forward_hooks)]

    before, logits = state(), model(input_ids=ids, use_cache=False).logits
    capture(model)
    assert state() == before
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)


@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear", "zamba2"])
def test_the_model_is_traced_once_and_export_is_the_work(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What capture does around `torch.export` are about 470 calls of Python functions per node; tracing needs 8 000."""
    traced(family)  # the first of a process imports much
    model, counter = tiny_model(family), CallCounter()
    forwards: list[nn.Module] = []
    model.register_forward_pre_hook(lambda module, _: forwards.append(module))
    monkeypatch.setattr(torch.export, "export", counter.paused(torch.export.export))
    with counter:
        program = capture(model)
    assert forwards == [model]
    assert counter.calls < 600 * len(program.graph.nodes)


def test_the_work_of_capture_is_linear_in_the_layers() -> None:
    """In calls of Python functions, which the load of the machine does not change: for 1, 2 and 4 layers."""
    traced("lfm2")
    models = [tiny_model("lfm2", num_hidden_layers=n, layer_types=["full_attention"] * n) for n in (1, 2, 4)]
    one, two, four = (calls_of(capture, model) for model in models)
    assert four - two < 1.1 * 2 * (two - one)


def test_router_logits_are_left_out() -> None:
    model = tiny_model("jamba", output_router_logits=True)
    results = capture(model).output_node().args[0]
    assert isinstance(results, tuple)
    assert len(results) == 1
    assert model.config.output_router_logits is True


def test_dropout_is_left_out() -> None:
    """A model in training mode is captured as in evaluation, and stays in training mode."""
    model = tiny_model("llama", attention_dropout=0.5).train()
    program = capture(model)
    assert model.training
    assert not [node for node in program.graph.nodes if "dropout" in str(node.target)]
    model.eval()
    assert_equal_to_eager(program, model, 2, 9)


def test_nodes_know_where_they_come_from() -> None:
    program = traced("qwen3_5_text")
    node = program.calls(ops.SOFTMAX_ATTENTION.op)[0]
    assert layer_of(node) == 3
    assert module_of(node) == ("model.layers.3.self_attn", "Qwen3_5Attention")
    assert "modeling_qwen3_5.py:" in source_line(program.calls(ops.SHORT_CONV.op)[0])


def on_meta(**shape: Any) -> Any:
    config = Qwen3_5TextConfig(
        head_dim=256, linear_num_key_heads=16, linear_key_head_dim=128, linear_value_head_dim=128, vocab_size=248320,
        **shape,
    )
    with torch.device("meta"):
        return Qwen3_5ForCausalLM._from_config(config, dtype=torch.bfloat16)


def test_meta_capture_needs_no_weights() -> None:
    """A period of layers as wide as those of the 2B model, from its configuration alone; names as in the checkpoint."""
    model = on_meta(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        linear_num_value_heads=16, tie_word_embeddings=True,
    )
    program = capture(model)
    assert program.dtype == torch.bfloat16
    assert program.op_counts()["flarec.linear_attention"] == 3
    assert program.parameters().keys() == dict(model.named_parameters()).keys()
    assert all(tensor.is_meta for tensor in (*program.module.parameters(), *program.module.buffers()))


def ops_by_layer(program: Program) -> dict[int | None, Counter[str]]:
    counts: dict[int | None, Counter[str]] = defaultdict(Counter)
    for node in program.graph.nodes:
        if node.op == "call_function":
            counts[layer_of(node)][str(node.target)] += 1
    return counts


def test_meta_capture_as_wide_as_9b() -> None:
    """Each of 8 layers has the nodes of its kind in the small model: neither width nor depth makes the graph grow.

    `benchmarks/capture_times.py` captures all 32 layers, and measures how long that takes.
    """
    model = on_meta(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, linear_num_value_heads=32, tie_word_embeddings=False,
    )
    program = capture(model)
    assert program.op_counts()["flarec.linear_attention"] == 6
    assert sum(p.numel() for p in program.parameters().values()) > 3.7e9
    assert program.parameters().keys() == dict(model.named_parameters()).keys()
    assert all(tensor.is_meta for tensor in (*program.module.parameters(), *program.module.buffers()))
    small = ops_by_layer(captured("qwen3_5_text"))
    expected = {None: small[None]} | {layer: small[layer % 4] for layer in range(8)}
    assert ops_by_layer(program) == expected


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


class StrangeMixer(nn.Module):
    """A token mixer of which no row knows."""

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        return hidden_states * 0.5, None


def test_unknown_mixer_names_class_layer_and_row() -> None:
    model = tiny_model("olmo_hybrid")
    model.model.layers[1].self_attn = StrangeMixer()
    with pytest.raises(CaptureError, match=r"layer 1 .*StrangeMixer.* 'olmo_hybrid' in flarec/frontend/families\.py$"):
        capture(model)


def test_unknown_mixer_of_a_model_without_row_says_so() -> None:
    model = tiny_model("llama")
    model.model.layers[0].self_attn = StrangeMixer()
    with pytest.raises(CaptureError, match=r"layer 0 .*row 'llama' in .*there is no such row yet: see CONTRIBUTING"):
        capture(model)


def test_layers_without_a_mixer_are_declared_by_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = families.FAMILIES["nemotron_h"]
    bare = Family(row.model_type, row.mixers, row.functions)
    kinds: dict[str, Any] = {"layers_block_type": ["linear_attention", "mlp", "full_attention"]}
    with monkeypatch.context() as patch:
        patch.setitem(families.FAMILIES, "nemotron_h", bare)
        with pytest.raises(CaptureError, match=r"layer 1 \(NemotronHBlock.*no recognised token mixer.*'nemotron_h'"):
            capture(tiny_model("nemotron_h", **kinds))
    model = tiny_model("nemotron_h", **kinds)  # a layer that should have one is still noticed
    model.model.layers[2].mixer = StrangeMixer()
    with pytest.raises(CaptureError, match=r"layer 2 .*StrangeMixer"):
        capture(model)


@pytest.mark.parametrize("name", ["function_of_tomorrow", "BambaMixer.method_of_tomorrow"])
def test_renamed_function_is_an_error_not_a_silent_pass(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    row = families.FAMILIES["bamba"]
    functions = dict(row.functions) | {name: short_conv_hook}
    monkeypatch.setitem(families.FAMILIES, "bamba", Family(row.model_type, row.mixers, functions))
    with pytest.raises(CaptureError, match=f"family 'bamba': .*has no {name}"):
        capture(tiny_model("bamba"))


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
