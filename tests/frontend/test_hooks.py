"""Hooks: what they hand to the ops, and what they refuse instead of dropping it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import masking_utils
from transformers.activations import ACT2FN
from transformers.integrations.moe import batched_mm_experts_forward, use_experts_implementation

from flarec.errors import CaptureError
from flarec.frontend import families
from flarec.frontend.custom_backward import custom_functions
from flarec.frontend.export import capture
from flarec.frontend.family import Family
from flarec.frontend.hooks.functions import mamba2_hook, selective_scan_hook, short_conv_hook
from flarec.frontend.hooks.interfaces import EXPERT_ACTIVATIONS, Causal, attention_hook, experts_hook, mask_hook
from flarec.frontend.hooks.methods import bounded_sqrt
from flarec.frontend.tiny import TINY, TinyModel
from flarec.kernels.moe_experts.reference import ACTIVATIONS
from tests.models import tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0,
}


# Softmax attention and its masks


def test_masks_are_understood() -> None:
    documents = torch.tensor([[0, 0, 1, 1]])
    positions = torch.tensor([[0, 1, 0, 1]])
    window = masking_utils.sliding_window_causal_mask_function(5)
    packed = masking_utils.packed_sequence_mask_function(documents)
    assert mask_hook(mask_function=masking_utils.causal_mask_function) == Causal(None)
    assert mask_hook(mask_function=window) == Causal(5)
    assert mask_hook(mask_function=masking_utils.and_masks(packed, window)) == Causal(5)
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):
        both = masking_utils.packed_sequence_compatibility_function(window, positions, documents)
        assert mask_hook(mask_function=both) == Causal(5)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (masking_utils.bidirectional_mask_function, "bidirectional_mask_function"),
        (masking_utils.chunked_causal_mask_function(8, torch.zeros(1)), "chunked_overlay"),
        (masking_utils.packed_sequence_mask_function(torch.zeros(1, 4)), "not causal"),
        (masking_utils.or_masks(masking_utils.causal_mask_function, lambda *_: True), "or_masks"),
        (masking_utils.and_masks(masking_utils.causal_mask_function, lambda *_: True), "<lambda>|test_hooks|<module>"),
    ],
)
def test_masks_that_are_not_causal_are_refused(function: Any, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        mask_hook(mask_function=function)


def test_the_window_is_that_of_the_mask() -> None:
    """As in the eager forward: a layer's `sliding_window` only chooses the mask."""
    program = capture(tiny_model("gemma2"))
    windows = [node.kwargs["window"] for node in program.calls(torch.ops.flarec.softmax_attention.default)]
    kinds = [{"sliding_attention": 12, "full_attention": None}[kind] for kind in program.config.layer_types]
    assert windows == kinds
    assert set(windows) == {12, None}


def test_attention_refuses_what_the_op_does_not_cover() -> None:
    q, layer, causal = torch.zeros(1, 1, 2, 4), nn.Linear(1, 1), Causal()
    with pytest.raises(CaptureError, match="not causal"):
        attention_hook(layer, q, q, q, causal, is_causal=False)
    with pytest.raises(CaptureError, match="without the model's causal mask"):
        attention_hook(layer, q, q, q, None)
    with pytest.raises(CaptureError, match="sinks"):
        attention_hook(layer, q, q, q, causal, s_aux=torch.zeros(1))
    with pytest.raises(CaptureError, match="position_bias"):
        attention_hook(layer, q, q, q, causal, position_bias=q)
    attention_hook(layer, q, q, q, causal, position_ids=q, sliding_window=3)


@pytest.mark.parametrize(
    ("model_type", "prefix", "values", "words"),
    [
        ("gpt_oss", "GptOss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, "has sinks"),
        ("gptj", "GPTJ", {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}, "other functions than its own"),
        ("falcon", "Falcon", {}, "computes with its attention mask itself"),
        ("bloom", "Bloom", {"n_layer": 1, "n_head": 2}, "family 'bloom'.* takes no position_ids"),
    ],
)
def test_softmax_models_that_do_not_fit_are_refused(
    model_type: str, prefix: str, values: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TINY, model_type, TinyModel(f"{prefix}Config", f"{prefix}ForCausalLM", SMALL | values))
    with pytest.raises(CaptureError, match=words):
        capture(tiny_model(model_type))


def test_attention_by_chunks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = SMALL | {"head_dim": 16, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 32}
    monkeypatch.setitem(TINY, "llama4_text", TinyModel("Llama4TextConfig", "Llama4ForCausalLM", values))
    with pytest.raises(CaptureError, match="chunked_overlay, which is neither causal nor a sliding window"):
        capture(tiny_model("llama4_text"))


# Experts


def toy_experts(activation: str = "silu", *, transposed: bool = False, gated: bool = True, **layout: Any) -> Any:
    """Three experts of width 5 on 4 features, in one of the layouts that transformers knows."""

    class ToyExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            up, down = (3, 10 if gated else 5, 4), (3, 4, 5)
            shapes = [(e, i, o) if transposed else (e, o, i) for e, o, i in (up, down)]
            weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
            setattr(self, "gate_up_proj" if gated else "up_proj", weights[0])
            self.down_proj = weights[1]
            self.num_experts = 3
            self.act_fn = ACT2FN[activation]

        def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            raise AssertionError("the interface chooses the function")

    settings = {"is_transposed": transposed, "has_gate": gated} | layout
    return use_experts_implementation(**settings)(ToyExperts)(SimpleNamespace(_experts_implementation="eager"))


@pytest.mark.parametrize("activation", EXPERT_ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_expert_layouts_equal_those_of_transformers(activation: str, gated: bool, transposed: bool) -> None:
    module = toy_experts(activation, transposed=transposed, gated=gated)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 4, generator=generator)
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(7)])
    weight = torch.rand(7, 2, generator=generator)
    parameters = tuple(module.parameters())
    expected = batched_mm_experts_forward(module, x, index, weight)
    got = experts_hook(module, x, index, weight)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for mine, theirs in zip(torch.autograd.grad(got.square().sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "words"),
    [({"has_bias": True}, "biases"), ({"is_concatenated": False}, "interleaved_gates")],
)
def test_expert_layouts_without_an_op_are_refused(layout: dict[str, Any], words: str) -> None:
    with pytest.raises(CaptureError, match=f"experts ToyExperts is given {words}"):
        experts_hook(toy_experts(**layout), torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def test_gates_and_activations_of_their_own_are_refused() -> None:
    arguments = torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(CaptureError, match="activation Tanh; flarec::moe_experts covers silu"):
        experts_hook(toy_experts("tanh"), *arguments)
    module = toy_experts()
    type(module)._apply_gate = lambda self, hidden: hidden[..., :5]
    with pytest.raises(CaptureError, match="gate of their own"):
        experts_hook(module, *arguments)


def test_the_op_knows_the_activations_that_the_hook_hands_over() -> None:
    assert set(EXPERT_ACTIVATIONS) <= set(ACTIVATIONS)


# Recurrences


def test_recurrences_refuse_what_the_ops_do_not_cover() -> None:
    x = torch.zeros(1, 2, 4)
    with pytest.raises(CaptureError, match="initial_states"):
        short_conv_hook(x, torch.zeros(2, 4), initial_states=x)
    with pytest.raises(CaptureError, match="seq_idx"):
        short_conv_hook(x, torch.zeros(2, 4), seq_idx=x)
    with pytest.raises(CaptureError, match="mamba2_chunk_scan is given z"):
        mamba2_hook(x, x, x, x, x, z=x)
    with pytest.raises(CaptureError, match="return_last_state"):
        selective_scan_hook(x, x, x, x, x, return_last_state=True)
    short_conv_hook(x, torch.zeros(2, 4), position_embeddings=(x, x))  # context that the function never reads


# Custom backwards


class Doubled(torch.autograd.Function):
    """The identity, with twice the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


ALIAS = Doubled.apply


class DoublingMLP(nn.Module):
    def __init__(self, inner: nn.Module, *, alias: bool) -> None:
        super().__init__()
        self.inner, self.alias = inner, alias

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        return ALIAS(hidden) if self.alias else Doubled.apply(hidden)


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_custom_backward_is_refused(alias: bool, frozen: bool) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = DoublingMLP(model.model.layers[1].mlp, alias=alias)
    model.requires_grad_(not frozen)
    with pytest.raises(CaptureError, match=r"LlamaForCausalLM computes with .*test_hooks\.Doubled, an autograd.Func"):
        capture(model)
    assert {p.requires_grad for p in model.parameters()} == {not frozen}


def test_the_row_of_recurrent_gemma_is_needed_for_its_custom_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    row = families.FAMILIES["recurrent_gemma"]
    bare = Family(row.model_type, row.mixers, methods=row.methods)
    monkeypatch.setitem(families.FAMILIES, "recurrent_gemma", bare)
    with pytest.raises(CaptureError, match="SqrtBoundDerivative"):
        capture(tiny_model("recurrent_gemma"))


def test_custom_ops_are_no_custom_functions() -> None:
    x = torch.rand(3, requires_grad=True)
    assert custom_functions(bounded_sqrt(x, 10.0)) == set()
    assert custom_functions(Doubled.apply(F.silu(x)).sum()) == {Doubled}


def test_bounded_sqrt_equals_the_function_that_it_replaces() -> None:
    function = transformers.models.recurrent_gemma.modeling_recurrent_gemma.SqrtBoundDerivative
    values = torch.tensor([0.0, 1e-12, 1e-8, 2.4e-7, 2.6e-7, 1e-3, 1.0])
    weight = torch.linspace(-1, 1, len(values))
    results = []
    for sqrt in (lambda x: bounded_sqrt(x, 1000.0), function.apply):
        x = values.clone().requires_grad_()
        y = sqrt(x)
        results.append((y, *torch.autograd.grad((y * weight).sum(), x)))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)
    torch.library.opcheck(bounded_sqrt, (values.clone().requires_grad_(), 1000.0))
