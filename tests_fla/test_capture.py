"""The captured program equals the library's own model over plain kernels, in float64, forward and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from flarec import ops
from flarec.frontend.export import capture
from tests.models import tiny_model, widened

from .tiny import NAMES

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("transformer", {"qkv_bias": True, "tie_word_embeddings": True, "fuse_norm": False, "fuse_swiglu": False}),
    ("gated_deltanet", {"use_gate": False, "allow_neg_eigval": True, "attn": None}),
    ("gated_deltanet", {"use_short_conv": False, "output_gate_activation": "sigmoid", "expand_v": 2.0}),
    ("kda", {"allow_neg_eigval": True, "safe_gate": True, "lower_bound": -5.0}),
    ("kda", {"use_short_conv": False, "num_v_heads": None}),
    ("delta_net", {"qk_activation": "elu", "qk_norm": "sum", "use_gate": True}),
    ("delta_net", {"use_short_conv": False, "use_beta": False, "expand_k": 0.5}),
    ("gla", {"use_short_conv": True, "feature_map": "relu", "clamp_min": -3.0, "num_kv_heads": None}),
    ("gla", {"use_output_gate": False}),
    ("retnet", {"use_short_conv": True, "feature_map": "relu", "use_output_gate": False}),
    ("linear_attn", {"feature_map": "elu", "norm_q": True, "norm_k": True}),
    ("hgrn2", {"use_short_conv": True, "use_lower_bound": False}),
    ("hgrn", {"use_short_conv": True, "expand_ratio": 2}),
    ("mla", {"q_lora_rank": None, "window_size": 7, "v_head_dim": 24}),
    ("samba", {"residual_in_fp32": True, "use_bias": True}),
    ("mamba", {"residual_in_fp32": True, "use_bias": True, "use_conv_bias": False}),
    ("mamba2", {"rmsnorm": False, "D_has_hdim": True, "dt_limit": (0.01, 0.8), "use_bias": True}),
    ("mamba2", {"norm_before_gate": True, "use_conv_bias": False}),
    ("rwkv7", {"fuse_norm": False, "norm_first": False}),
    ("rwkv7", {"norm_bias": False}),
]
CASES = [(name, {}) for name in NAMES] + OPTIONS


def _label(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *case[1]])


class Wide(TorchFunctionMode):
    """Within it float64 takes the place of float32: the library casts to float32 inside its layers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args, kwargs = tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return func(*args, **kwargs)


@pytest.mark.parametrize("case", CASES, ids=_label)
def test_forward_and_gradients_equal_the_library(case: tuple[str, dict[str, Any]]) -> None:
    """At batches and lengths other than the traced ones, on both sides of 64, where the library changes kernels."""
    family, options = case
    stock = tiny_model(family, **options).double()
    program = widened(capture(tiny_model(family, **options)))
    parameters = dict(stock.named_parameters())
    ours_by_name = program.parameters()
    assert set(ours_by_name) <= {n for n, _ in stock.named_parameters(remove_duplicate=False)}
    for shape in ((3, 13), (1, 70)):
        generator = torch.Generator().manual_seed(shape[1])
        ids = torch.randint(3, 300, shape, generator=generator)
        weight = torch.randn(*shape, stock.config.vocab_size, generator=generator, dtype=torch.float64)
        with Wide():
            eager = stock(input_ids=ids).logits
            expected = torch.autograd.grad((eager * weight).mean(), list(parameters.values()), allow_unused=True)
        ours = program(ids, position_ids=torch.arange(shape[1]).expand(shape).contiguous())
        got = torch.autograd.grad((ours * weight).mean(), [ours_by_name[n] for n in parameters], allow_unused=True)
        difference = float((ours - eager).abs().max() / eager.abs().max())
        assert difference <= 1e-9
        for name, a, b in zip(parameters, got, expected, strict=True):
            assert a is not None and b is not None, name
            assert (a - b).norm() <= 1e-8 * b.norm() + 1e-14, name


@pytest.mark.parametrize("family", NAMES)
def test_every_layer_is_one_mixer(family: str) -> None:
    """One recurrence per layer without softmax attention, one softmax attention in the others."""
    program = capture(tiny_model(family))
    mixers = [mixer for mixer in ops.mixers() if mixer not in (ops.SHORT_CONV, ops.MOE_EXPERTS)]
    counts = [len(program.calls(mixer.op)) for mixer in mixers]
    layers = tiny_model(family).config.num_hidden_layers
    assert sum(counts) == layers
    assert counts[0] == {"transformer": layers, "mla": layers, "mamba": 0, "mamba2": 0, "rwkv7": 0}.get(family, 1)
