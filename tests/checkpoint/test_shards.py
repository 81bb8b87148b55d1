"""Weights in several files: read, hashed and written; tied heads, biases and unpadded vocabularies among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flarec.checkpoint.directory import describe_source, open_checkpoint
from flarec.checkpoint.manifest import Manifest
from flarec.checkpoint.weights import stored_dtypes
from flarec.checkpoint.write import check_shard_size, write_checkpoint
from flarec.errors import CheckpointError, UsageError
from tests.checkpoints import manifest_for
from tests.cli.conversions import QUICK, flarec, write_data
from tests.models import TOKENS, tiny_checkpoint
from tests.wrappers import all_tensors

INDEX = "model.safetensors.index.json"
IDS = torch.arange(3, 43).reshape(2, 20)


def split(path: Path) -> Path:
    """Save the model of a directory again, in small files."""
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="100KB")
    assert len(shards(path)) > 2
    return path


def shards(path: Path) -> list[str]:
    return sorted(file.name for file in path.glob("model-*-of-*.safetensors"))


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = AutoModelForCausalLM.from_pretrained(path).eval()(IDS).logits
    return result


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split(tiny_checkpoint(tmp_path_factory.mktemp("shards"), "bamba"))


def rewrite(source: Path, out: Path, **options: Any) -> Path:
    opened = open_checkpoint(source)
    return write_checkpoint(out, opened.load_model(), opened.load_tokenizer(), manifest_for(source), **options)


@pytest.mark.parametrize(
    ("family", "tokens", "overrides"),
    [
        ("qwen3_5_text", TOKENS, {"tie_word_embeddings": True, "attention_bias": True}),
        ("bamba", TOKENS, {"vocab_size": TOKENS, "mamba_proj_bias": True, "mlp_bias": True}),  # an unpadded vocabulary
    ],
)
def test_a_source_in_shards_becomes_a_checkpoint_in_shards(
    family: str, tokens: int, overrides: dict[str, Any], tmp_path: Path
) -> None:
    source = split(tiny_checkpoint(tmp_path, family, tokens=tokens, **overrides))
    out = tmp_path / "out"
    options = ["--recipe", "draft", "--max-shard-size", "100KB", "--set", "evaluation.every=0", *QUICK[:10]]
    result = flarec("convert", source, "--data", write_data(tmp_path / "data.jsonl"), "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert len(shards(out)) > 2 and not (out / "model.safetensors").exists()
    assert max((out / name).stat().st_size for name in shards(out)) < 250_000
    manifest = Manifest.read(out)
    assert manifest is not None and {INDEX, *shards(out)} <= set(manifest.files)
    before, after = all_tensors(source), all_tensors(out)
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in before.items()}
    biases = [name for name in before if name.endswith(".bias")]
    assert len(biases) > 3
    assert [name for name in biases if torch.equal(before[name], after[name])] == [], "biases are trained too"
    assert ("lm_head.weight" in after) != bool(overrides.get("tie_word_embeddings"))
    assert flarec("generate", out, "say red", "--max-new-tokens", 4, "--device", "cpu").exit_code == 0


@pytest.mark.parametrize("size", [None, "60KB", 60_000])
def test_the_same_logits_whatever_the_number_of_files(size: Any, source: Path, tmp_path: Path) -> None:
    out = rewrite(source, tmp_path / "out", **({} if size is None else {"max_shard_size": size}))
    assert (len(shards(out)) > 4) == (size is not None)
    assert (out / "model.safetensors").exists() == (size is None)
    assert torch.equal(logits(out), logits(source))


def test_the_source_hash_covers_every_shard(source: Path, tmp_path: Path) -> None:
    out = rewrite(source, tmp_path / "out", max_shard_size="60KB")
    before = describe_source(out).sha256
    last = out / shards(out)[-1]
    tensors = load_file(last)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, last, metadata={"format": "pt"})
    assert describe_source(out).sha256 != before
    with pytest.raises(CheckpointError, match=rf"{last.name} was changed"):
        open_checkpoint(out)


def test_a_second_copy_of_the_weights_is_nobodys_business(source: Path, tmp_path: Path) -> None:
    """Some publishers put the same weights into another file, with names and dtypes of their own."""
    out = rewrite(source, tmp_path / "out")
    (out / "flarec.json").unlink()
    before = describe_source(out)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(out / "model.safetensors").items()}
    save_file(tensors, out / "consolidated.safetensors")
    assert describe_source(out) == before
    model = open_checkpoint(out).load_model()
    assert set(stored_dtypes(out, model).values()) == {torch.float32}


def test_a_missing_shard(source: Path, tmp_path: Path) -> None:
    out = rewrite(source, tmp_path / "out", max_shard_size="60KB")
    name = shards(out)[1]
    (out / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        open_checkpoint(out)
    (out / "flarec.json").unlink()
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(out).load_model()


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_an_index_that_cannot_be_read(text: str, source: Path, tmp_path: Path) -> None:
    out = rewrite(source, tmp_path / "out", max_shard_size="60KB")
    (out / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json cannot be read"):
        describe_source(out)


@pytest.mark.parametrize("size", ["5GB", "500 MB", "1.5tb", "100kb", "0.5GB"])
def test_shard_sizes(size: str) -> None:
    check_shard_size(size)


@pytest.mark.parametrize("size", ["", "5", "GB", "-1GB", "0GB", "0.0GB", "5GiB", "five GB", "1e3MB"])
def test_shard_sizes_that_mean_nothing(size: str) -> None:
    with pytest.raises(UsageError, match="give a size such as 5GB"):
        check_shard_size(size)


def test_shards_are_refused_where_the_files_stay(tmp_path: Path) -> None:
    result = flarec("convert", tmp_path, "--data", "x", "--max-shard-size", "5GB", "--recipe", "adapter-dual")
    assert result.exit_code == 2
    assert "over an adapter the weight files are the source's own" in " ".join(result.stderr.split())


def test_a_bad_shard_size_is_told_before_anything_is_read(tmp_path: Path) -> None:
    result = flarec("convert", tmp_path, "--data", "x", "--max-shard-size", "big")
    assert result.exit_code == 2
    assert "shard size 'big' is unknown" in result.stderr
    assert json.dumps(result.stdout) == '""'
