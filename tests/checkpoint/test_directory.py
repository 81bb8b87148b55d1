"""Checkpoints: what transformers sees of them, and how damage is noticed."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from flarec.base.hashes import FileEntry
from flarec.checkpoint.card import licence_of, model_card
from flarec.checkpoint.directory import describe_source, open_checkpoint
from flarec.checkpoint.manifest import NAME, Manifest
from flarec.checkpoint.own import check_destination
from flarec.checkpoint.weights import stored_dtypes
from flarec.checkpoint.write import write_checkpoint
from flarec.errors import CheckpointError, FlarecWarning
from flarec.passes.embed_mask import PARAMETER
from tests.checkpoints import MASK_ROW, converted, manifest_for, mask_vector
from tests.models import FAMILIES, VOCABULARY, tiny_checkpoint, tiny_model, tiny_tokenizer


@pytest.fixture
def parts(pair: tuple[Path, Path]) -> dict[str, Any]:
    """Arguments of `write_checkpoint`, but for the destination."""
    opened = open_checkpoint(pair[0])
    return {"model": tiny_model("bamba"), "tokenizer": opened.load_tokenizer(), "manifest": manifest_for(pair[0])}


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(ids).logits
    return result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_opens_it_with_the_same_logits(family: str, tied: bool, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", family, tie_word_embeddings=tied)
    opened = open_checkpoint(source)
    live = opened.load_model(torch.float32)
    out = write_checkpoint(tmp_path / "out", live, opened.load_tokenizer(), manifest_for(source))
    again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    assert type(again) is type(live)
    assert torch.equal(logits(again), logits(live))
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(live).__name__]
    assert "auto_map" not in config


def test_nothing_names_the_machine(pair: tuple[Path, Path]) -> None:
    for path in pair[1].rglob("*"):
        if path.is_file():
            assert str(pair[0].parent).encode() not in path.read_bytes(), path


def test_every_file_has_the_users_usual_mode(parts: dict[str, Any], tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        out = write_checkpoint(tmp_path / "out", **parts)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o644}
    assert out.stat().st_mode & 0o777 == 0o755


def test_the_live_model_stays_as_it_was(parts: dict[str, Any], tmp_path: Path) -> None:
    model = parts["model"]
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    config = (model.config.dtype, model.config.architectures, model.generation_config.suppress_tokens)
    out = write_checkpoint(tmp_path / "out", **parts, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name][1])
    assert (model.config.dtype, model.config.architectures, model.generation_config.suppress_tokens) == config
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype == torch.bfloat16
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, before[name][1].to(torch.bfloat16)), name


def test_every_tensor_keeps_its_own_dtype(parts: dict[str, Any], tmp_path: Path) -> None:
    """Sources keep decay rates in float32 beside bfloat16 matrices; a round trip must not change a bit."""
    source = tiny_checkpoint(tmp_path / "source", "bamba")
    tensors = load_file(source / "model.safetensors")
    mixed = {name: tensor if name.endswith("A_log") else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    model = open_checkpoint(source).load_model(torch.float32)
    dtypes = stored_dtypes(source, model)
    assert {dtype for name, dtype in dtypes.items() if name.endswith("A_log")} == {torch.float32}
    out = write_checkpoint(tmp_path / "out", model, parts["tokenizer"], parts["manifest"], dtype=dtypes)
    written = load_file(out / "model.safetensors")
    assert written.keys() == mixed.keys()
    for name, tensor in mixed.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_dtypes_are_matched_through_a_wrapper_prefix(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "bamba")
    tensors = load_file(source / "model.safetensors")
    renamed = {
        name.replace("model.", "model.language_model.", 1): tensor if "A_log" in name else tensor.bfloat16()
        for name, tensor in tensors.items()
    }
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    dtypes = stored_dtypes(source, tiny_model("bamba"))
    assert {"A_log" in name for name, dtype in dtypes.items() if dtype == torch.float32} == {True}
    assert {"A_log" in name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == {False}


def test_tokenizer_and_generation_config_are_carried_over(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "bamba")
    generation = GenerationConfig(eos_token_id=[2, 5], do_sample=True, temperature=0.7, suppress_tokens=[9])
    generation.save_pretrained(source)
    opened = open_checkpoint(source)
    tokenizer = opened.load_tokenizer()
    out = write_checkpoint(tmp_path / "out", opened.load_model(), tokenizer, manifest_for(source))
    written = GenerationConfig.from_pretrained(out)
    assert written.suppress_tokens == [9, MASK_ROW]
    assert (written.eos_token_id, written.do_sample, written.temperature) == ([2, 5], True, 0.7)
    again = AutoTokenizer.from_pretrained(out)
    assert again.chat_template == tokenizer.chat_template
    assert again("What is 3 + 4?")["input_ids"] == tokenizer("What is 3 + 4?")["input_ids"]
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_a_mask_vector_is_stored_apart(tmp_path: Path) -> None:
    _, out = converted(tmp_path, "bamba", "vector", dtype=torch.bfloat16)
    extra = open_checkpoint(out).load_extra()
    assert list(extra) == [PARAMETER]
    assert torch.equal(extra[PARAMETER], mask_vector()[PARAMETER].to(torch.bfloat16))
    assert open_checkpoint(out).load_extra(torch.float32)[PARAMETER].dtype == torch.float32
    assert GenerationConfig.from_pretrained(out).suppress_tokens is None  # there is no row that could be generated
    AutoModelForCausalLM.from_pretrained(out)


def test_a_model_that_was_not_converted_has_no_manifest(pair: tuple[Path, Path]) -> None:
    assert open_checkpoint(pair[0]).manifest is None
    assert open_checkpoint(pair[0]).load_extra() == {}


def test_attachments_are_copied_and_listed(parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "m").write_text("{}\n")
    out = write_checkpoint(tmp_path / "out", **parts, attachments={"metrics.jsonl": tmp_path / "m"})
    assert (out / "metrics.jsonl").read_text() == "{}\n"
    manifest = open_checkpoint(out).manifest
    assert manifest is not None and "metrics.jsonl" in manifest.files


# --- the manifest


def test_the_manifest_lists_every_other_file(pair: tuple[Path, Path]) -> None:
    manifest = open_checkpoint(pair[1]).manifest
    assert manifest is not None
    names = {p.relative_to(pair[1]).as_posix() for p in pair[1].rglob("*") if p.is_file()} - {NAME}
    assert set(manifest.files) == names
    assert {"model.safetensors", "README.md", "custom_generate/generate.py", "chat_template.jinja"} <= names
    assert all(manifest.files[name] == FileEntry.of(pair[1] / name) for name in names)
    assert manifest.versions["torch"] == torch.__version__


def test_manifest_round_trip(pair: tuple[Path, Path]) -> None:
    manifest = open_checkpoint(pair[1]).manifest
    assert manifest is not None
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_metrics_that_are_not_numbers_become_null(pair: tuple[Path, Path]) -> None:
    manifest = dataclasses.replace(manifest_for(pair[0]), metrics={"loss": float("nan"), "all": [1.0, float("inf")]})
    assert Manifest.from_json(manifest.to_json()).metrics == {"loss": None, "all": [1.0, None]}


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "not a manifest of flarec"),
        ('{"name": "something else"}', "not a manifest of flarec"),
        ('{"format_version": "one"}', "not a manifest of flarec"),
        ('{"format_version": 1}', "no key 'source'"),
        ('{"format_version": 3}', "made by a newer flarec: upgrade"),
        ('{"format_version": true}', "not a manifest of flarec"),
        ('{"format_version": 0}', "not a manifest of flarec"),
        ('{"format_version": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_a_foreign_manifest(copy: Path, contents: str, message: str) -> None:
    (copy / NAME).write_text(contents)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    "values",
    [
        {"surprise": 1},
        {"mask": {"kind": "hole", "token_id": 3}},
        {"mask": {"kind": "row", "token_id": -1}},
        {"mask": {"kind": "row"}},
        {"mask": {"kind": "row", "token_id": 3, "ids": [[0, 3]]}},
        {"mask": {"kind": "random", "token_id": 3}},
        *({"mask": {"kind": "random", "token_id": 9, "ids": ids}} for ids in (
            [], 3, [3], [[1, 1]], [[2, 5], [4, 9]], [[5, 9], [0, 2]], [[0, True]], [[-1, 2]], [[0, 2.0]], [[0, 2, 3]],
            [[0, 2**40]],
        )),
        {"mask": 3},
        {"decode": {"block_size": 0, "readouts": {}}},
        {"decode": {"block_size": 4, "readouts": {"ar-trust": "sideways"}}},
        {"files": {"../elsewhere": {"bytes": 1, "sha256": ""}}},
        {"files": []},
        {"files": {"x": {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {"x": {"bytes": 1, "sha256": "0"}}},
        {"files": {"/x": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"x\0": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"x": {"bytes": True, "sha256": "0" * 64}}},
        {"files": {"x": 3}},
        {"source": {"name": 3}},
        {"source": {"name": "x", "sha256": "short"}},
        {"source": []},
        {"mask": {"kind": "row", "token_id": True}},
        {"mask": {"kind": "row", "token_id": 3.0}},
        {"mask": {"kind": "row", "token_id": 2**31}},
        {"mask": {"kind": ["row"], "token_id": 3}},
        {"decode": {"block_size": True, "readouts": {}}},
        {"decode": {"block_size": 10**9, "readouts": {}}},
        {"decode": {"block_size": 4, "readouts": {"sideways": "causal"}}},
        {"decode": {"block_size": 4, "readouts": {"ar-trust": ["causal"]}}},
        {"decode": {"block_size": 4, "readouts": {}, "confidence_threshold": 1.5}},
        {"decode": {"block_size": 4, "readouts": {}, "confidence_threshold": "high"}},
        {"decode": {"block_size": 4, "readouts": {}, "recheck": 1.5}},
        {"decode": {"block_size": 4, "readouts": {}, "denoising_steps": -1}},
        {"decode": {"block_size": 4, "readouts": {}, "drafts": "many"}},
        {"pipelines": {"decode": 3}},
        {"pipelines": "canonicalize()"},
        {"versions": {"torch": 2}},
        {"plugins": {"mine": None}},
        {"recipe": []},
        {"data": 1},
        {"metrics": None},
    ],
)
def test_a_manifest_with_values_that_make_no_sense(copy: Path, values: dict[str, Any]) -> None:
    _edit(copy / NAME, **values)
    with pytest.raises(CheckpointError, match="not a manifest of flarec"):
        open_checkpoint(copy)


def test_a_manifest_that_is_not_text(copy: Path) -> None:
    (copy / NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(copy)


def test_any_other_value_is_noticed_too(copy: Path) -> None:
    """Values within their bounds: the manifest has a hash of its own, and says how it is used as it is."""
    table = json.loads((copy / NAME).read_text())
    table["decode"]["confidence_threshold"] = 0.8
    del table["decode"]["recheck"]
    (copy / NAME).write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"was changed after it was written .*put format_version 1 and take"):
        open_checkpoint(copy)
    del table["sha256"]
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        open_checkpoint(copy)
    (copy / NAME).write_text(json.dumps({**table, "format_version": 1}))
    manifest = open_checkpoint(copy).manifest
    assert manifest is not None and manifest.decode.confidence_threshold == 0.8
    assert manifest.decode.recheck == 0  # of checkpoints that were converted before there was one
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_every_flipped_byte_and_every_truncation_of_the_manifest(pair: tuple[Path, Path]) -> None:
    """Or nothing is changed by it: white space."""
    data = (pair[1] / NAME).read_bytes()
    original = Manifest.from_json(data.decode())
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 7
        for damaged in (bytes(flipped), *([data[:place]] if place % 50 == 0 else [])):
            try:
                manifest = Manifest.from_json(damaged.decode(errors="replace"))
            except CheckpointError:
                continue
            assert manifest == original, damaged[place - 20 : place + 20]


def test_the_mask_token_is_no_word(copy: Path) -> None:
    manifest = Manifest.read(copy)
    assert manifest is not None
    wrong = dataclasses.replace(manifest, mask=dataclasses.replace(manifest.mask, token_id=17))
    (copy / NAME).write_text(wrong.to_json())
    with pytest.raises(CheckpointError, match=r"the mask token 17 is '.*' of the tokenizer"):
        open_checkpoint(copy).load_tokenizer()


def test_a_deleted_manifest_is_missed(copy: Path, pair: tuple[Path, Path]) -> None:
    """What config.json states is used, and somebody may want that; a source model is none of these."""
    (copy / NAME).unlink()
    with pytest.warns(FlarecWarning, match=r"has no flarec.json: it decodes as its config.json says"):
        assert open_checkpoint(copy).manifest is not None
    config = json.loads((copy / "config.json").read_text())
    plain = {name: config[name] for name in config.keys() - {"dual_mode", "mask_token_id", "block_size"}}
    (copy / "config.json").write_text(json.dumps(plain))
    with pytest.warns(FlarecWarning, match=r"has no flarec.json: it decodes causally only; copy it again"):
        assert open_checkpoint(copy).manifest is None
    (copy / "custom_generate" / "generate.py").unlink()
    save_file({"x": torch.zeros(1)}, copy / "flarec.safetensors")
    with pytest.warns(FlarecWarning, match=r"has no flarec.json"):
        open_checkpoint(copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(pair[0])


@pytest.mark.parametrize("name", ["README.md", "custom"])
def test_card_and_log_are_free_to_edit(copy: Path, parts: dict[str, Any], name: str, tmp_path: Path) -> None:
    if name == "custom":
        (tmp_path / "m").write_text("{}")
        copy, name = tmp_path / "other", "metrics.jsonl"
        write_checkpoint(copy, **parts, attachments={name: tmp_path / "m"})
    (copy / name).write_text("mine")
    assert open_checkpoint(copy, whole=True).manifest is not None
    (copy / name).unlink()
    assert open_checkpoint(copy, whole=True).manifest is not None
    check_destination(copy, overwrite=True)


# --- the card and the source


def test_source_description(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "bamba")
    (source / "README.md").write_text('---\ntags: [x]\nlicense: "apache-2.0"\n---\n# Card\nlicense: not this\n')
    described = describe_source(source)
    assert (described.name, described.licence) == ("bamba", "apache-2.0")
    again = describe_source(source)
    assert described == again
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors")
    assert describe_source(source).sha256 != described.sha256


@pytest.mark.parametrize(
    "text", [None, "# no front matter\nlicense: mit\n", "---\ntags: []\n---\nlicense: mit\n", "---\n"]
)
def test_no_licence_stated(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) is None


def test_model_card_states_what_matters(pair: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = manifest_for(pair[0])
    source = dataclasses.replace(manifest.source, name="owner/model", licence="mit")
    (tmp_path / "README.md").write_text(model_card(dataclasses.replace(manifest, source=source), "mine"))
    assert licence_of(tmp_path) == "mit"
    card = (tmp_path / "README.md").read_text()
    assert "base_model: owner/model" in card
    assert str(MASK_ROW) in card and "draft" in card and "1.25" in card and "ar-trust: causal" in card
    assert f"id {VOCABULARY}" not in card
    assert "base_model" not in model_card(manifest, "mine")  # a directory's name is no hub id


def test_the_tokenizer_used_here_leaves_spare_rows() -> None:
    assert len(tiny_tokenizer()) <= MASK_ROW
