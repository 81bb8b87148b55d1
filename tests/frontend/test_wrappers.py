"""Multimodal checkpoints: the text model is converted, everything else is carried over bit for bit."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import flarec as package
from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.weights import stored_dtypes
from flarec.checkpoint.write import write_checkpoint
from flarec.errors import CaptureError, CheckpointError, FlarecWarning
from flarec.frontend.export import capture
from flarec.frontend.loading import text_name
from tests.checkpoints import manifest_for
from tests.cli.conversions import QUICK, flarec, write_data
from tests.frontend.source.sources import configure, rewrite
from tests.models import tiny_tokenizer
from tests.wrappers import IMAGE, PREDICTION, VISION_END, WRAPPERS, all_tensors, tiny_wrapper

EACH = [pytest.param(name, marks=pytest.mark.xdist_group(f"wrapper {name}")) for name in WRAPPERS]
"""A conversion each, made once: by the process that has all of its tests."""
MODES = ("causal", "ar-trust", "diffusion-trust")
ROUNDING = 1e-4  # of the largest logit, as for captured programs against eager models (tests/frontend/test_export.py)
IDS = torch.arange(3, 43).reshape(2, 20)


def opened(path: Path) -> Any:
    """By plain transformers, as the multimodal class."""
    return AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=False, dtype=torch.float32).eval()


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**inputs).logits
    return result


def program_logits(program: Any) -> torch.Tensor:
    positions = torch.arange(IDS.shape[1]).expand(IDS.shape[0], -1).contiguous()
    with torch.no_grad():
        result: torch.Tensor = program(IDS, position_ids=positions)
    return result


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


def is_text(name: str) -> bool:
    return name.startswith(("model.language_model.", "language_model.", "lm_head"))


@functools.cache
def conversion(directory: Path, model_type: str) -> tuple[Path, Path, str]:
    """(source, converted, what the command said)."""
    source = tiny_wrapper(directory, model_type)
    data = write_data(directory / f"{model_type}.jsonl")
    out = directory / f"{model_type}-flarec"
    quick = [*QUICK, "--steps", 3, "--set", "evaluation.every=0"]
    result = flarec("convert", source, "--data", data, "--out", out, "--recipe", "dual", *quick)
    assert result.exit_code == 0, result.output
    return source, out, result.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrappers")


@pytest.mark.parametrize("model_type", EACH)
def test_only_the_text_weights_change(model_type: str, directory: Path) -> None:
    source, out, _ = conversion(directory, model_type)
    before, after = all_tensors(source), all_tensors(out)
    assert list(after) == list(before)
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {
        name: (t.dtype, t.shape) for name, t in before.items()
    }
    untouched = [name for name in before if not is_text(name)]
    assert len(untouched) > 20
    assert [name for name in untouched if not torch.equal(before[name], after[name])] == []
    matrices = [name for name, tensor in before.items() if is_text(name) and tensor.dim() >= 2]
    assert len(matrices) > 10
    assert [name for name in matrices if torch.equal(before[name], after[name])] == []
    for name in ("preprocessor_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    stated = {"dual_mode", "mask_token_id", "block_size"}  # flarec.checkpoint.stated
    was, now = (json.loads((path / "config.json").read_text()) for path in (source, out))
    for table in (now, now["text_config"]):
        assert stated & table.keys() == stated
    now = {**now, "text_config": {name: now["text_config"][name] for name in now["text_config"].keys() - stated}}
    assert {name: now[name] for name in now.keys() - stated} == was


@pytest.mark.parametrize("model_type", EACH)
def test_what_is_carried_over_is_said(model_type: str, directory: Path) -> None:
    _, out, said = conversion(directory, model_type)
    architecture = json.loads((out / "config.json").read_text())["architectures"][0]
    assert f"{architecture}: the text model is converted" in said
    assert "preprocessor_config.json" in said
    line = next(line for line in said.splitlines() if "carried over untouched" in line)
    assert ("visual" in line) == model_type.startswith("qwen")
    assert ("mtp 1" in line) == (model_type == "qwen3_5")
    card = (out / "README.md").read_text()
    assert line in card and "image-text-to-text" in card


@pytest.mark.parametrize("model_type", EACH)
def test_transformers_opens_it_as_the_same_class_with_the_programs_logits(model_type: str, directory: Path) -> None:
    source, out, _ = conversion(directory, model_type)
    theirs, ours = opened(out), package.load(out)
    assert type(theirs) is type(opened(source))
    assert torch.equal(logits(ours.hf_model, input_ids=IDS), logits(theirs, input_ids=IDS))
    assert difference(program_logits(ours.program), logits(theirs, input_ids=IDS)) < ROUNDING
    assert difference(logits(theirs, input_ids=IDS), logits(opened(source), input_ids=IDS)) > 1e-3  # it was trained
    assert ours.manifest is not None and ours.manifest.mask.kind == "row"
    if model_type.startswith("qwen"):  # ids that only the wrapper names are no spare rows
        assert ours.manifest.mask.token_id == VISION_END + 1


@pytest.mark.parametrize("model_type", EACH)
def test_all_modes_decode(model_type: str, directory: Path) -> None:
    source, out, _ = conversion(directory, model_type)
    ours = package.load(out)
    ids = torch.tensor([ours.encode("say red")])
    expected = opened(out).generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    outputs = {mode: ours.generate("say red", mode=mode, max_new_tokens=16).token_ids for mode in MODES}
    assert outputs["causal"] == outputs["ar-trust"] == expected
    assert outputs["diffusion-trust"]
    unconverted = opened(source).generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    assert package.load(source).generate("say red", max_new_tokens=16).token_ids == unconverted


def test_images_still_reach_the_text_model(directory: Path) -> None:
    source, out, _ = conversion(directory, "qwen3_5")
    old, new = opened(source), opened(out)
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[1, 4, 4]])
    with torch.no_grad():
        before, after = (model.get_image_features(pixels, grid, return_dict=True) for model in (old, new))
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    ids = torch.tensor([[5, VISION_END - 1, *[IMAGE] * 4, VISION_END, 7, 8]])
    types = (ids == IMAGE).int()
    image = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": types}
    assert difference(logits(new, **image), logits(new, **{**image, "pixel_values": -pixels})) > 1e-3


def test_custom_generate_of_the_open_wrapper(directory: Path) -> None:
    _, out, _ = conversion(directory, "qwen3_5")
    model = opened(out)
    ids = torch.tensor([tiny_tokenizer()("say red")["input_ids"]])
    greedy = model.generate(ids, max_new_tokens=12, do_sample=False)
    options = {"custom_generate": str(out), "trust_remote_code": True, "do_sample": False}
    assert torch.equal(model.generate(ids, max_new_tokens=12, mode="ar-trust", **options), greedy)


@pytest.mark.parametrize("model_type", EACH)
def test_a_wrapper_in_memory_is_captured_with_its_own_parameters(model_type: str, directory: Path) -> None:
    model = opened(tiny_wrapper(directory / "memory", model_type))
    program = capture(model)
    assert difference(program_logits(program), logits(model, input_ids=IDS)) < ROUNDING
    theirs = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in theirs for parameter in program.parameters().values())
    assert not any("vis" in name for name in program.parameters())


def test_shards_stay_as_they_are(tmp_path: Path) -> None:
    source = tiny_wrapper(tmp_path, max_shard_size="200KB")
    files = sorted(path.name for path in source.glob("model-*.safetensors"))
    assert len(files) > 2
    checkpoint = open_checkpoint(source)
    model = checkpoint.load_model(torch.float32)
    carried = checkpoint.carried(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    out = write_checkpoint(
        tmp_path / "out", model, checkpoint.load_tokenizer(), manifest_for(source), carried=carried
    )
    assert sorted(path.name for path in out.glob("model-*.safetensors")) == files
    for name in files:
        before, after = load_file(source / name), load_file(out / name)
        assert list(before) == list(after)
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor + 1.0 if is_text(key) else tensor), key
    assert difference(logits(opened(out), input_ids=IDS), logits(model, input_ids=IDS)) < 1e-6


def test_a_tied_head_that_is_stored_all_the_same_is_not_left_behind(tmp_path: Path) -> None:
    source = tiny_wrapper(tmp_path, "gemma3")
    tensors = load_file(source / "model.safetensors")
    embedding = "language_model.model.embed_tokens.weight"
    head = "language_model.lm_head.weight"
    assert head not in tensors
    save_file({**tensors, head: tensors[embedding].clone()}, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(source)
    model = checkpoint.load_model(torch.float32)
    carried = checkpoint.carried(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    out = write_checkpoint(
        tmp_path / "out", model, checkpoint.load_tokenizer(), manifest_for(source), carried=carried
    )
    written = all_tensors(out)
    assert torch.equal(written[embedding], tensors[embedding] + 1.0)
    assert torch.equal(written[head], written[embedding])


def test_where_the_outer_key_is_absent_the_inner_one_says_whether_the_head_is_tied(tmp_path: Path) -> None:
    """transformers takes the outer default, and would draw a head; what is written says it in both places."""
    source = tiny_wrapper(tmp_path)
    rewrite(source, lambda every: {name: value for name, value in every.items() if "lm_head" not in name})
    table = json.loads((source / "config.json").read_text())
    configure(source, tie_word_embeddings=..., text_config=table["text_config"] | {"tie_word_embeddings": True})
    checkpoint = open_checkpoint(source)
    model = checkpoint.load_model(torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    out = write_checkpoint(
        tmp_path / "out", model, checkpoint.load_tokenizer(), manifest_for(source), carried=checkpoint.carried(model)
    )
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert difference(logits(opened(out), input_ids=IDS), logits(model, input_ids=IDS)) < 1e-6


def test_a_head_of_its_own_is_written_as_one(tmp_path: Path) -> None:
    source = tiny_wrapper(tmp_path, "gemma3")
    head = torch.randn(512, 64, generator=torch.Generator().manual_seed(3)) / 8
    rewrite(source, lambda every: {**every, "language_model.lm_head.weight": head})
    checkpoint = open_checkpoint(source)
    with pytest.warns(FlarecWarning, match="holds a head that is not the embedding"):
        model = checkpoint.load_model(torch.float32)
    out = write_checkpoint(
        tmp_path / "out", model, checkpoint.load_tokenizer(), manifest_for(source), carried=checkpoint.carried(model)
    )
    table = json.loads((out / "config.json").read_text())
    assert table["tie_word_embeddings"] is table["text_config"]["tie_word_embeddings"] is False
    assert torch.equal(all_tensors(out)["language_model.lm_head.weight"], head)
    assert difference(logits(opened(out), input_ids=IDS), logits(model, input_ids=IDS)) < 1e-6


def test_weights_that_do_not_fit_back_are_an_error(tmp_path: Path) -> None:
    """A model that was not loaded from the checkpoint saves other names: nothing must be lost silently."""
    source = tiny_wrapper(tmp_path)
    checkpoint = open_checkpoint(source)
    model = checkpoint.load_model(torch.float32)
    made = type(model)(model.config)
    with pytest.raises(CheckpointError, match=r"cannot be put together; save the source"):
        write_checkpoint(
            tmp_path / "out", made, checkpoint.load_tokenizer(), manifest_for(source), carried=checkpoint.carried(model)
        )
    assert not (tmp_path / "out").exists()


def test_the_dtypes_of_the_vision_tower_are_not_those_of_the_text(tmp_path: Path) -> None:
    source = tiny_wrapper(tmp_path, "gemma3")  # vision in bfloat16; both have layers.0.self_attn.q_proj.weight
    model = open_checkpoint(source).load_model()
    assert set(stored_dtypes(source, model).values()) == {torch.float32}


def test_a_wrapper_whose_text_model_is_no_causal_model(tmp_path: Path) -> None:
    model = opened(tiny_wrapper(tmp_path))
    model.config.text_config.model_type = "bert_like"
    model.config.text_config.__class__ = type("Unknown", (type(model.config.text_config),), {})
    with pytest.raises(CaptureError, match="no causal language model"):
        capture(model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.visual.blocks.0.norm1.bias", "model.visual.blocks.0.norm1.bias"),
        (PREDICTION, PREDICTION),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert text_name(name) == expected
