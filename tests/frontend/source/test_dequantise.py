"""Quantised weights as plain ones: the numbers, what is written, what stays, and what transformers would get wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flarec.base.hashes import sha256_of
from flarec.checkpoint.directory import DEQUANTIZED, open_checkpoint
from flarec.checkpoint.manifest import AdapterInfo
from flarec.checkpoint.plain import write_plain
from flarec.checkpoint.write import write_adapter_checkpoint
from flarec.errors import CheckpointError, UsageError
from flarec.frontend.loading import judge_source, load_model
from flarec.frontend.source.dequantise import why_not
from flarec.frontend.source.formats import Quantised
from flarec.frontend.source.headers import read_headers
from tests.checkpoints import manifest_for
from tests.cli.conversions import QUICK, flarec, write_data
from tests.frontend.source.sources import Tensors, configure, copied, in_fp8, original, packed, rewrite

BLOCK = 8
KEY = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
FAMILIES = ("qwen3_5_text", "kimi_linear", "bamba")


def quantised(directory: Path, family: str = "qwen3_5_text", *, key: bool = True) -> Path:
    path = copied(directory, family)
    rewrite(path, lambda every: in_fp8(every, BLOCK))
    if key:
        configure(path, quantization_config=KEY)
    return path


def expected(path: Path) -> dict[str, Tensor]:
    """What the files of a source mean, in float32: scales repeated over their blocks."""
    every: Tensors = load_file(path / "model.safetensors")
    result = {}
    for name, tensor in every.items():
        if name.endswith("_scale_inv"):
            continue
        scales = every.get(f"{name}_scale_inv")
        if scales is None:
            result[name] = tensor.float()
            continue
        grid = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        result[name] = tensor.float() * grid[: tensor.shape[0], : tensor.shape[1]]
    return result


@pytest.mark.parametrize("key", [True, False], ids=["with its key", "without a key"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_copy_holds_what_the_files_mean(family: str, key: bool, tmp_path: Path) -> None:
    path = quantised(tmp_path, family, key=key)
    write_plain(tmp_path / "plain", path, dequantize=True, adapter=None)
    before, after = expected(path), load_file(tmp_path / "plain" / "model.safetensors")
    assert torch.float32 in {tensor.dtype for tensor in after.values()} or family == "kimi_linear"
    assert after.keys() == before.keys() == load_file(original(family) / "model.safetensors").keys()
    for name, tensor in after.items():
        quantised_once = f"{name}_scale_inv" in load_file(path / "model.safetensors")
        assert tensor.dtype == torch.bfloat16 or not quantised_once, name
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name
    table = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not any("quant" in name for name in table)
    assert open_checkpoint(tmp_path / "plain").load_tokenizer() is not None
    assert judge_source(tmp_path / "plain").notes == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_the_model_is_as_if_the_files_were_plain(dtype: torch.dtype | None, tmp_path: Path) -> None:
    path = quantised(tmp_path)
    model = load_model(path, dtype, "cpu", dequantize=True)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.bfloat16}
    assert not hasattr(model.config, "quantization_config")
    for name, value in expected(path).items():
        assert torch.equal(model.state_dict()[name], value.to(dtype or torch.bfloat16)), name


@pytest.mark.slow
def test_a_conversion_writes_plain_weights(tmp_path: Path) -> None:
    path, data, out = quantised(tmp_path), write_data(tmp_path / "data.jsonl"), tmp_path / "out"
    quick = [*QUICK, "--steps", 1, "--set", "evaluation.every=0"]
    result = flarec("convert", path, "--dequantize", "--data", data, "--out", out, *quick)
    assert result.exit_code == 0, result.output
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert judge_source(out).notes == ()


def test_an_adapter_keeps_the_files_and_opens_over_the_plain_form(tmp_path: Path) -> None:
    """As `flarec convert --dequantize --recipe adapter` writes it."""
    path = quantised(tmp_path)
    manifest = replace(manifest_for(path, "vector"), adapter=AdapterInfo(4, 8.0, "all"), data={DEQUANTIZED: True})
    out = write_adapter_checkpoint(tmp_path / "out", path, manifest, {"mask": torch.nn.Parameter(torch.ones(3))})
    assert sha256_of(out / "model.safetensors") == sha256_of(path / "model.safetensors")
    model = open_checkpoint(out).load_model(torch.float32)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected(path).items())
    with pytest.raises(CheckpointError, match="add --dequantize"):
        open_checkpoint(path).load_model(torch.float32)


def blocks_of(size: int, key: bool) -> tuple[Tensors, dict[str, object]]:
    every = in_fp8(load_file(original("qwen3_5_text") / "model.safetensors"), size)
    return every, {"quantization_config": {**KEY, "weight_block_size": [size, size]}} if key else {}


@pytest.mark.parametrize("key", [True, False])
def test_blocks_that_transformers_would_misplace(key: bool, tmp_path: Path) -> None:
    """64 rows in blocks of 48: a block of 48 and one of 16, which it reads as two of 32."""
    path = copied(tmp_path)
    every, config = blocks_of(48, key)
    rewrite(path, lambda _: every)
    configure(path, **config)
    if key:
        with pytest.raises(UsageError, match=r"is 64 long, not 2 blocks of 48: transformers would misplace"):
            judge_source(path, dequantize=True)
        return
    every["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(3, 1)  # 128 rows in three
    rewrite(path, lambda _: every)
    with pytest.raises(UsageError, match=r"cannot be dequantised: .* is 128 long, not 3 blocks"):
        judge_source(path, dequantize=True)


def test_the_blocks_that_a_text_config_states_count_too(tmp_path: Path) -> None:
    path = copied(tmp_path)
    every, config = blocks_of(48, key=True)
    rewrite(path, lambda _: every)
    kind, stored = Quantised("fp8", "", True), read_headers(path)
    reason = why_not(kind, config, stored)
    assert "blocks of 48: transformers would misplace" in reason
    assert why_not(kind, {"text_config": config}, stored) == reason


def test_formats_that_it_does_not_read(tmp_path: Path) -> None:
    path = copied(tmp_path)
    rewrite(path, packed("qweight", "qzeros", "scales", "g_idx"))
    with pytest.raises(UsageError, match=r"\(gptq: .*\), and cannot be dequantised: transformers does not dequantise"):
        judge_source(path, dequantize=True)
    other = copied(tmp_path / "other")
    rewrite(other, lambda every: in_fp8(every, 1 << 20, "_scale"))
    with pytest.raises(UsageError, match=r"cannot be dequantised: .*weight has no weight_scale_inv beside it"):
        judge_source(other, dequantize=True)


def test_what_has_nothing_to_dequantise(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are not quantised; leave out --dequantize"):
        judge_source(original("qwen3_5_text"), dequantize=True)


def test_combinations_that_mean_nothing(tmp_path: Path) -> None:
    path, data = quantised(tmp_path), write_data(tmp_path / "data.jsonl")
    for options, words in (
        (["--dequantize", "--adapter-only"], "--adapter-only is for an adapter"),
        (["--dequantize", "--recipe", "adapter", "--prompts", data], "--prompts asks the source for answers"),
    ):
        result = flarec("convert", path, "--data", data, "--out", tmp_path / "out", *QUICK, *options)
        assert result.exit_code == 2 and words in result.output, result.output
    assert not (tmp_path / "out").exists()
