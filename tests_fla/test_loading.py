"""Directories of the library's models: opened without the flash-attn package, refused with the reason, told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fla.layers.attn
import fla.models
import pytest
import torch
import transformers

from flarec.errors import CaptureError
from flarec.frontend.export import capture, load_model
from flarec.frontend.fla import families
from tests.models import tiny_checkpoint, tiny_config, tiny_model

CONFIGS = {
    value.model_type: value
    for value in vars(fla.models).values()
    if isinstance(value, type) and issubclass(value, transformers.PreTrainedConfig)
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_opens_without_the_flash_attention_package(tmp_path: Path, monkeypatch: Any, device: str) -> None:
    """The library's attention layer refuses to be built without it; nothing of it runs in a captured program."""
    path = tiny_checkpoint(tmp_path, "gla")
    monkeypatch.setattr(fla.layers.attn, "flash_attn_func", None)
    with pytest.raises(ImportError):
        tiny_model("gla")
    model = load_model(path, None, device)
    assert fla.layers.attn.flash_attn_func is None, "put back"
    program = capture(model)
    assert program.op_counts()["flarec.softmax_attention"] == 1
    if device == "cpu":
        logits = program(torch.arange(3, 12)[None], position_ids=torch.arange(9)[None])
        assert bool(torch.isfinite(logits).all())


def test_every_model_of_the_library_converts_or_has_a_reason() -> None:
    assert len(CONFIGS) > 30
    assert set(CONFIGS) == {*families.MODEL_TYPES, *families.REFUSED}
    assert not {*families.MODEL_TYPES} & {*families.REFUSED}


@pytest.mark.parametrize("model_type", families.REFUSED)
def test_refused_with_the_reason(model_type: str) -> None:
    config = object.__new__(CONFIGS[model_type])  # some cannot be made from defaults
    with pytest.raises(CaptureError) as caught:
        families.row_of(config)
    assert families.REFUSED[model_type] in str(caught.value)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gla", {"attnres_block_size": 2}, "attnres_block_size"),
        ("gated_deltanet", {"hidden_act": "powlu"}, "hidden_act='powlu'"),
        ("linear_attn", {"norm_feature_map": True}, "normalize"),
        ("gla", {"feature_map": "gelu"}, "feature map .*'gelu'"),
    ],
)
def test_options_that_no_hook_covers_are_refused(family: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        capture(tiny_model(family, **options))


def test_a_model_type_of_both_libraries_is_told_by_its_class() -> None:
    assert families.row_of(transformers.Mamba2Config()) is None
    assert families.row_of(tiny_config("mamba2")) is not None


def test_groups_of_mamba2_are_read_as_in_transformers() -> None:
    """With several groups the library's own fallback for a CPU is not what its CUDA kernels do; transformers' is."""
    options = {"n_groups": 2, "residual_in_fp32": False}
    model = tiny_model("mamba2", **options)
    config = transformers.models.mamba2.Mamba2Config(
        vocab_size=512, hidden_size=64, num_hidden_layers=3, head_dim=16, num_heads=8, state_size=16, n_groups=2,
        expand=2, chunk_size=32, layer_norm_epsilon=1e-5, use_bias=False, tie_word_embeddings=False, rms_norm=True,
    )
    stock = transformers.models.mamba2.Mamba2ForCausalLM(config).eval()
    stock.load_state_dict(model.state_dict())
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = stock(ids, use_cache=False).logits
    ours = capture(model)(ids, position_ids=torch.arange(40).expand(2, -1).contiguous())
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
