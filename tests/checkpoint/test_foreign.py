"""Dual-mode checkpoints of other programs: Qwen3.5 text weights, a mask id in the padded vocabulary, no manifest."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import flarec as package
from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.manifest import DecodeDefaults, MaskToken
from flarec.cli import main
from flarec.errors import CheckpointError, GenerationError, UsageError
from tests.checkpoints import manifest_for
from tests.cli.conversions import QUICK, flarec, write_data
from tests.models import TOKENS, VOCABULARY, tiny_checkpoint

MODES = ("causal", "ar-trust", "diffusion-trust")
MASK_ID, BLOCK = TOKENS + 7, 3
# As released: ids 0 .. 248076 belong to the tokenizer, the embedding is padded to a multiple of 256.
RELEASED_ROWS, RELEASED_MASK = 248_320, 248_077
STATED = {"mask_token_id": MASK_ID, "block_size": BLOCK}
PROMPT = "What is 12 + 30?"


def foreign(directory: Path, stated: dict[str, Any], **overrides: Any) -> Path:
    """A plain transformers directory; `stated` is added to its config.json."""
    path = tiny_checkpoint(directory, "qwen3_5_text", **overrides)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **stated}))
    assert not (path / "flarec.json").exists()
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("foreign")


@functools.cache
def plain(directory: Path) -> Path:
    """Says nothing about masks and blocks."""
    return foreign(directory / "plain", {})


@functools.cache
def stating(directory: Path) -> Path:
    return foreign(directory / "stating", STATED)


def generate(path: Path, mode: str, *options: object) -> dict[str, Any]:
    words = ["generate", path, PROMPT, "--mode", mode, "--max-new-tokens", 12, "--device", "cpu", "--json", *options]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    output: dict[str, Any] = json.loads(result.stdout)[0]
    return output


@pytest.mark.parametrize("where", ["options", "config"])
def test_generate_opens_it_in_all_modes(where: str, directory: Path) -> None:
    path, options = (plain(directory), ["--mask-token-id", MASK_ID, "--block-size", BLOCK])
    if where == "config":
        path, options = stating(directory), []
    outputs = {mode: generate(path, mode, *options) for mode in MODES}
    assert {mode: output["mode"] for mode, output in outputs.items()} == {mode: mode for mode in MODES}
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor([package.load(path).encode(PROMPT)])
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert outputs["causal"]["token_ids"] == outputs["ar-trust"]["token_ids"] == expected
    assert outputs["diffusion-trust"]["token_ids"]
    # 12 tokens in blocks of three: no step can do more
    for mode in ("ar-trust", "diffusion-trust"):
        assert outputs[mode]["new_tokens"] / (outputs[mode]["forwards"] - 1) <= BLOCK + 1


def test_what_it_states_stands_for_the_manifest(directory: Path) -> None:
    checkpoint = open_checkpoint(stating(directory))
    assert checkpoint.foreign and checkpoint.manifest is not None
    assert checkpoint.manifest.mask == MaskToken("row", MASK_ID)
    readouts = {"ar-trust": "block_end", "diffusion-trust": "block_end"}
    assert checkpoint.manifest.decode == DecodeDefaults(BLOCK, readouts)
    other = open_checkpoint(stating(directory), block_size=5).manifest
    assert other is not None and (other.mask.token_id, other.decode.block_size) == (MASK_ID, 5)
    assert open_checkpoint(plain(directory)).manifest is None


def test_the_mask_row_decides_the_drafts_and_is_never_generated(directory: Path) -> None:
    model = package.load(plain(directory), mask_token_id=MASK_ID, block_size=BLOCK)
    options: dict[str, Any] = {"mode": "diffusion-trust", "max_new_tokens": 16}
    before = model.generate(PROMPT, **options).token_ids
    causal = model.generate(PROMPT, mode="causal", max_new_tokens=16).token_ids
    embedding, head = model.hf_model.get_input_embeddings().weight, model.hf_model.get_output_embeddings().weight
    with torch.no_grad():
        embedding[MASK_ID] *= -3
        assert model.generate(PROMPT, mode="causal", max_new_tokens=16).token_ids == causal
        assert model.generate(PROMPT, **options).token_ids != before
        head.mul_(0.01)
        head[MASK_ID] *= 5000
        for mode in MODES:
            assert MASK_ID not in model.generate(PROMPT, mode=mode, max_new_tokens=16).token_ids


def test_the_released_vocabulary(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 1, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 1,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "tie_word_embeddings": True,
    }
    stated = {"mask_token_id": RELEASED_MASK, "block_size": BLOCK}
    path = foreign(tmp_path, stated, vocab_size=RELEASED_ROWS, **sizes)
    model = package.load(path)
    assert model.hf_model.get_input_embeddings().weight.shape == (RELEASED_ROWS, 16)
    outputs = {mode: model.generate(PROMPT, mode=mode, max_new_tokens=8).token_ids for mode in MODES}
    assert outputs["causal"] == outputs["ar-trust"]
    assert all(len(tokens) == 8 and RELEASED_MASK not in tokens for tokens in outputs.values())


@pytest.mark.parametrize(
    ("stated", "given", "message"),
    [
        ({}, {"mask_token_id": MASK_ID}, "states no block_size; give --block-size too"),
        ({}, {"block_size": BLOCK}, "states no mask_token_id; give --mask-token-id too"),
        ({"mask_token_id": None}, {"block_size": BLOCK}, "states no mask_token_id"),
        ({}, {"mask_token_id": -1, "block_size": BLOCK}, "mask_token_id is -1; give a whole number from 0"),
        (STATED, {"block_size": 0}, "block_size is 0; give a whole number from 1"),
    ],
)
def test_values_that_cannot_be_used(
    stated: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5_text", **stated}))
    with pytest.raises(UsageError, match=message):
        open_checkpoint(tmp_path, **given)


@pytest.mark.parametrize(
    "stated", [{"block_size": 1024}, {"mask_token_id": 5}, {"mask_token_id": None, "block_size": 4},
               {"mask_token_id": True, "block_size": 4}, {"mask_token_id": "5", "block_size": 4}],
)
def test_one_of_the_two_alone_makes_no_dual_mode_checkpoint(stated: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5_text", **stated}))
    assert open_checkpoint(tmp_path).manifest is None


def test_values_in_the_configuration_of_a_text_model_inside(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": STATED}))
    manifest = open_checkpoint(tmp_path).manifest
    assert manifest is not None and manifest.mask.token_id == MASK_ID


def test_a_mask_token_outside_of_the_vocabulary(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"mask token {VOCABULARY} is no row .* which has {VOCABULARY}"):
        package.load(plain(directory), mask_token_id=VOCABULARY, block_size=BLOCK)


def test_without_the_options_it_is_a_source_model(directory: Path) -> None:
    with pytest.raises(GenerationError, match="give mask_token_id and block_size"):
        package.load(plain(directory)).generate(PROMPT, mode="ar-trust")


def test_training_goes_on_with_the_mask_row_it_has(directory: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.jsonl")
    options = ["--recipe", "flare", "--set", "evaluation.every=0", "--set", "optimizer.lr=1e-6", *QUICK[:6]]
    result = flarec("convert", stating(directory), "--data", data, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert f"mask token {MASK_ID}, blocks of {BLOCK}): training goes on" in result.stderr
    checkpoint = open_checkpoint(tmp_path / "out")
    assert not checkpoint.foreign and checkpoint.manifest is not None
    assert checkpoint.manifest.mask == MaskToken("row", MASK_ID)
    rows = [open_checkpoint(path).load_model().get_input_embeddings().weight for path in
            (stating(directory), tmp_path / "out")]
    assert torch.allclose(rows[0][MASK_ID], rows[1][MASK_ID], atol=1e-5)  # six tiny steps, no new start at the mean
    assert not torch.allclose(rows[0][MASK_ID], rows[0][:TOKENS].mean(0), atol=1e-1)


def test_a_manifest_is_not_overruled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    source = foreign(tmp_path / "source", {})
    (tmp_path / "flarec.json").write_text(manifest_for(source).to_json())
    with pytest.raises(UsageError, match=r"flarec.json states the mask token and the block size; leave them out"):
        open_checkpoint(tmp_path, block_size=4)


def test_tensors_that_transformers_passes_over_are_named(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "nemotron_h")
    checkpoint = open_checkpoint(source)
    assert checkpoint.left_out(checkpoint.load_model(device="meta")) == ()
    weights = source / "model.safetensors"
    save_file({**load_file(weights), "mtp.layers.0.fc.weight": torch.zeros(2)}, weights, metadata={"format": "pt"})
    assert checkpoint.left_out(checkpoint.load_model(device="meta")) == ("mtp.layers.0.fc.weight",)
    data = write_data(tmp_path / "data.jsonl")
    result = flarec("convert", source, "--data", data, "--out", tmp_path / "out", *QUICK, "--recipe", "dual")
    assert result.exit_code == 0, result.output
    assert "left out: mtp.layers.0.fc.weight of the source, which transformers does not load" in result.stderr
    weights.write_bytes(weights.read_bytes()[:100])
    result = flarec("convert", source, "--data", data, "--out", tmp_path / "again", *QUICK, "--recipe", "dual")
    assert result.exit_code == CheckpointError.exit_code
    assert "model.safetensors is truncated" in result.output
