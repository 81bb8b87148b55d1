"""`--merge-adapter`: the merged model computes what peft's adapted one did, or the adapter is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flarec.checkpoint.adapter import CONFIG
from flarec.checkpoint.plain import write_plain
from flarec.errors import CheckpointError
from flarec.frontend.loading import load_model
from tests.checkpoints import adapted
from tests.cli.conversions import QUICK, flarec, write_data
from tests.models import TOKENS, tiny_checkpoint

IDS = torch.randint(3, TOKENS, (2, 11), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def lora(source: Path, folder: Path, modules: str | list[str], **options: Any) -> torch.Tensor:
    """Save an adapter with random numbers for a model; the logits that peft gives with it."""
    model = AutoModelForCausalLM.from_pretrained(source)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM", **options)
    made = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    made.save_pretrained(folder)
    return logits(made)


@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear", "bamba", "llama"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_the_merged_model_computes_what_the_adapted_one_did(family: str, options: Any, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, family)
    modules = ["q_proj", "o_proj", "down_proj", "in_proj"]
    expected = lora(source, tmp_path / "lora", modules, **options)
    write_plain(tmp_path / "plain", source, dequantize=False, adapter=tmp_path / "lora")
    model = load_model(tmp_path / "plain", torch.float32, "cpu")
    assert (logits(model) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (logits(AutoModelForCausalLM.from_pretrained(source)) - expected).abs().max() > 1e-2 * expected.abs().max()
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()
    assert not (tmp_path / "plain" / CONFIG).exists()


SHARED = [
    ("zamba", r".*shared_transf\..*q_proj"), ("zamba2", r".*shared_transformer\..*q_proj"), ("jamba", r".*dt_proj"),
]


@pytest.mark.parametrize(("family", "modules"), SHARED)
def test_what_no_merge_can_say_is_refused(family: str, modules: str, tmp_path: Path) -> None:
    """Blocks that several layers share, with an adapter each; a weight that the model reads without calling it."""
    overrides = {"tie_word_embeddings": True} if family != "jamba" else {}
    source = tiny_checkpoint(tmp_path, family, **overrides)
    lora(source, tmp_path / "lora", modules)
    with pytest.raises(CheckpointError, match=r"cannot be merged: the merged model's logits are .* from those of"):
        write_plain(tmp_path / "plain", source, dequantize=False, adapter=tmp_path / "lora")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(("family", "modules"), [("zamba", r".*mamba.out_proj"), ("zamba2", r".*mamba.out_proj"),
                                                 ("jamba", r".*(q_proj|x_proj|mamba.in_proj)")])
def test_their_other_modules_are_merged(family: str, modules: str, tmp_path: Path) -> None:
    overrides = {"tie_word_embeddings": True} if family != "jamba" else {}
    source = tiny_checkpoint(tmp_path, family, **overrides)
    expected = lora(source, tmp_path / "lora", modules)
    write_plain(tmp_path / "plain", source, dequantize=False, adapter=tmp_path / "lora")
    merged = logits(load_model(tmp_path / "plain", torch.float32, "cpu"))
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_conversion_over_a_merged_adapter(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "qwen3_5_text")
    lora(source, tmp_path / "lora", ["q_proj", "down_proj"])
    data, out = write_data(tmp_path / "data.jsonl"), tmp_path / "out"
    quick = [*QUICK, "--steps", 2, "--set", "evaluation.every=0"]
    result = flarec("convert", source, "--merge-adapter", tmp_path / "lora", "--data", data, "--out", out, *quick)
    assert result.exit_code == 0, result.output
    assert flarec("generate", out, "say red", "--max-new-tokens", 2, "--device", "cpu").exit_code == 0
    bare = flarec("convert", tmp_path / "lora", "--data", data, "--out", tmp_path / "other", *quick)
    assert bare.exit_code == 2 and re.search(r"is an adapter of peft, not a model; give its model", bare.stderr)


def test_adapters_of_other_models(tmp_path: Path) -> None:
    source, other = tiny_checkpoint(tmp_path, "llama"), tiny_checkpoint(tmp_path, "bamba")
    lora(other, tmp_path / "lora", ["in_proj"])
    with pytest.raises(CheckpointError, match="is no adapter for this model"):
        write_plain(tmp_path / "plain", source, dequantize=False, adapter=tmp_path / "lora")
    lora(other, tmp_path / "both", ["in_proj", "q_proj"])
    with pytest.raises(CheckpointError, match="is no adapter for this model"):
        write_plain(tmp_path / "plain", source, dequantize=False, adapter=tmp_path / "both")


def test_our_own_adapters_are_never_merged(tmp_path: Path) -> None:
    source, out = adapted(tmp_path, "bamba")
    with pytest.raises(CheckpointError, match="is a noise-row adapter of flarec and cannot be merged"):
        write_plain(tmp_path / "plain", source, dequantize=False, adapter=out / "adapter")


def test_files_that_are_none(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "llama")
    lora(source, tmp_path / "lora", ["q_proj"])
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no .*; give a directory that peft's save_pretrained wrote"):
        write_plain(tmp_path / "plain", source, dequantize=False, adapter=tmp_path / "lora")
    (tmp_path / "lora" / CONFIG).write_text(json.dumps({"r": 4}))
    (tmp_path / "lora" / "adapter_model.bin").rename(tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="states no peft_type"):
        write_plain(tmp_path / "plain", source, dequantize=False, adapter=tmp_path / "lora")
