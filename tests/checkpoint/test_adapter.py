"""Checkpoints with an adapter: the source's files byte for byte, peft's layout, and no other model."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import flarec
from flarec.checkpoint.adapter import place_source
from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.lowered import pipeline_of
from flarec.checkpoint.manifest import Manifest, MaskToken
from flarec.checkpoint.plain import write_plain
from flarec.cli import main
from flarec.errors import CheckpointError, GenerationError, UsageError
from flarec.ir.program import Program
from flarec.passes.adapt_noisy_stream import adapter_parameters
from flarec.passes.embed_mask import PARAMETER
from flarec.verify import verify
from tests.checkpoints import adapted, converted, mask_vector, tree
from tests.models import FAMILIES, TOKENS, VOCABULARY, tiny_checkpoint
from tests.wrappers import PREDICTION, all_tensors, tiny_wrapper

OURS = {"README.md", "flarec.json", "adapter", "custom_generate"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(source, checkpoint) of each family, in the source's own files."""
    return {family: adapted(tmp_path_factory.mktemp("adapted"), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return adapted(tmp_path_factory.mktemp("alone"), "bamba", alone=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_directory_is_the_sources(family: str, made: dict[str, tuple[Path, Path]]) -> None:
    """Every file of the source, byte for byte; ours in folders, so that nothing that opens a model finds them."""
    source, out = made[family]
    before, after = tree(source), tree(out)
    assert {name: after.get(name) for name in before} == before
    assert {Path(name).parts[0] for name in after.keys() - before.keys()} == OURS
    assert not (out / "adapter_config.json").exists()
    manifest = Manifest.read(out)
    assert manifest is not None and manifest.adapter is not None
    assert manifest.files.keys() == {name for name, value in after.items() if value != "folder"} - {"flarec.json"}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_sources_logits_bit_for_bit(family: str, made: dict[str, tuple[Path, Path]]) -> None:
    source, out = made[family]
    ids = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (source, out))
    assert torch.equal(before, after)


def test_the_layout_is_pefts(made: dict[str, tuple[Path, Path]]) -> None:
    """What peft 0.21 writes for these modules (tests_peft opens it with peft)."""
    source, out = made["qwen3_5_text"]
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source)
    for module in config["target_modules"]:
        weight = model.get_submodule(module).weight
        down, up = (tensors.pop(f"base_model.model.{module}.lora_{part}.weight") for part in "AB")
        assert down.shape == (config["r"], weight.shape[1]) and up.shape == (weight.shape[0], config["r"])
        assert down.dtype == up.dtype == torch.float32
    assert not tensors and config["target_modules"]
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert "on all rows" in config["flarec_noisy_rows_only"]
    assert load_file(out / "adapter" / "flarec.safetensors").keys() == {PARAMETER}
    assert "do not load or merge it with peft" in (out / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_is_opened(family: str, made: dict[str, tuple[Path, Path]]) -> None:
    """Noisy rows use the adapter; AR-Trust gives the source's own text all the same, greedy and sampled."""
    source, out = made[family]
    plain, model = flarec.load(source), flarec.load(out)
    drafts = {}
    for temperature in (0.0, 1.0):
        wanted = plain.generate("say red", temperature=temperature, max_new_tokens=20, seed=5)
        given = model.generate("say red", temperature=temperature, max_new_tokens=20, seed=5)
        assert given.mode == "ar-trust" and given.token_ids == wanted.token_ids
        drafts[temperature] = model.generate("say red", mode="diffusion-trust", max_new_tokens=8).token_ids
    extra = open_checkpoint(out).load_extra()
    assert torch.equal(extra.pop(PARAMETER), mask_vector()[PARAMETER])
    for parameter in extra.values():
        assert parameter.dtype == torch.float32
    for name in extra:
        if name.endswith("lora_B.weight"):
            model.program.extra[name].data.zero_()
    assert model.generate("say red", mode="diffusion-trust", max_new_tokens=8).token_ids != drafts[0.0]


def test_random_ids_are_the_noise_of_a_checkpoint(tmp_path: Path) -> None:
    """The manifest names them; drafts are exact, and Diffusion-Trust is refused before anything is loaded."""
    source, out = adapted(tmp_path, kind="random")
    manifest = Manifest.read(out)
    assert manifest is not None and manifest.mask == MaskToken("random", VOCABULARY, ((3, 40), (44, TOKENS)))
    assert manifest.decode.readouts == {"ar-trust": "causal"} and not (out / "adapter" / "flarec.safetensors").exists()
    assert "masked positions show one of 293 ids at random" in (out / "README.md").read_text()
    plain, model = flarec.load(source), flarec.load(out)
    for temperature in (0.0, 1.0):
        options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 20, "seed": 5}
        assert model.generate("say red", **options).token_ids == plain.generate("say red", **options).token_ids
    with pytest.raises(GenerationError, match="random ids, which do not say what positions"):
        model.generate("say red", mode="diffusion-trust")
    said = CliRunner().invoke(main, ["generate", str(out), "say red", "--mode", "diffusion-trust"])
    assert said.exit_code == 2 and "random ids, which do not say what" in " ".join(said.stderr.split())
    results = list(verify(out, quick=True))
    assert [result.invariant for result in results] == [*range(1, 10), 11]
    assert all(result.passed for result in results), results
    more = replace(manifest, mask=replace(manifest.mask, ids=((3, VOCABULARY + 1),)))
    (out / "flarec.json").write_text(more.to_json())
    with pytest.raises(CheckpointError, match=f"random ids of .* go up to {VOCABULARY}, and it has {VOCABULARY} rows"):
        flarec.load(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_decoding_computes_no_adapter(family: str, made: dict[str, tuple[Path, Path]]) -> None:
    """It runs the source's program: as fast as the source, and the same text as the program with the adapter."""
    source, out = made[family]
    model, options = flarec.load(out), {"mode": "causal", "max_new_tokens": 12, "seed": 3, "temperature": 1.0}
    found = model.generate("say red", **options)
    assert found.token_ids == flarec.load(source).generate("say red", **options).token_ids
    program, adapter = model._causal(), adapter_parameters(model.program)

    def calls(program: Program) -> int:
        return sum(node.op == "call_function" for node in program.graph.nodes)

    read = {node.target for node in program.graph.nodes if node.op == "get_attr"}
    assert adapter and not read & adapter.keys() and model._causal() is program
    assert calls(program) <= calls(flarec.load(source).decode_program) + 8  # the mask vector's embedding
    assert program.cache_slots == model.decode_program.cache_slots, "steps without drafts take their turns with others"
    drafted = model.generate("say red", **{**options, "mode": "ar-trust", "drafts": "auto"})
    assert drafted.token_ids == found.token_ids
    model.engine._causal = lambda: model.decode_program
    assert model.generate("say red", **options).token_ids == found.token_ids


def test_where_adapters_compute_for_noisy_rows_alone(made: dict[str, tuple[Path, Path]]) -> None:
    """In decode steps of the torch kernels whose regions are not compiled, of a checkpoint that has an adapter."""
    source, with_adapter = made[FAMILIES[0]]
    cases: list[tuple[Path, str, dict[str, Any], bool]] = [
        (with_adapter, "decode", {}, True), (with_adapter, "decode", {"regions": True}, False),
        (with_adapter, "decode", {"kernels": "triton"}, False), (with_adapter, "train", {}, False),
        (source, "decode", {}, False),
    ]
    for folder, target, options, narrow in cases:
        steps = pipeline_of(open_checkpoint(folder).manifest, target, **{"kernels": "torch", **options})
        assert any(step.name == "narrow-adapter" for step in steps) == narrow, (folder, target, options)


def test_custom_generate(made: dict[str, tuple[Path, Path]], alone: tuple[Path, Path]) -> None:
    """In transformers: of a whole checkpoint, and of an adapter whose model is elsewhere."""
    source, out = made["bamba"]
    ids = torch.tensor([[5, 9, 33, 12]])
    wanted = AutoModelForCausalLM.from_pretrained(source).generate(ids, max_new_tokens=12, do_sample=False)
    model = AutoModelForCausalLM.from_pretrained(out)
    options: dict[str, Any] = {"trust_remote_code": True, "max_new_tokens": 12, "do_sample": False}
    assert model.generate(ids, custom_generate=str(out), **options).tolist() == wanted.tolist()
    source, adapter = alone
    model = AutoModelForCausalLM.from_pretrained(source)
    given = model.generate(ids, custom_generate=str(adapter), adapter=str(adapter), mode="ar-trust", **options)
    assert given.tolist() == wanted.tolist()


def test_an_adapter_alone_is_opened_with_its_source(alone: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = alone
    assert {path.name for path in out.iterdir()} == OURS
    wanted = flarec.load(source).generate("say red", max_new_tokens=12)
    given = flarec.load(source, adapter=out).generate("say red", max_new_tokens=12)
    assert given.mode == "ar-trust" and given.token_ids == wanted.token_ids
    result = CliRunner().invoke(main, ["generate", str(source), "say red", "--adapter", str(out), "--check", "--json",
                                       "--max-new-tokens", "12"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["token_ids"] == wanted.token_ids
    (tmp_path / "d.jsonl").write_text('{"prompt": "say", "response": " red"}\n')
    result = CliRunner().invoke(main, ["eval", str(source), "--adapter", str(out), "--data", str(tmp_path / "d.jsonl"),
                                       "--max-new-tokens", "4"])
    assert result.exit_code == 0 and "ar-trust" in result.output, result.output


def test_another_source_is_refused(alone: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = alone
    other = tiny_checkpoint(tmp_path, "bamba", seed=1)
    refusals: dict[str, Callable[[], Any]] = {
        "is not the model that the adapter in": lambda: flarec.load(other, adapter=out),
        "holds no adapter of flarec": lambda: flarec.load(source, adapter=source),
        "does not exist": lambda: flarec.load(source, adapter=tmp_path / "nowhere"),
        "holds an adapter without its model; give the model (bamba) and --adapter": lambda: flarec.load(out),
        "cannot be merged into a model": lambda: flarec.load(out / "adapter"),
    }
    for words, call in refusals.items():
        with pytest.raises(CheckpointError, match=r"^[^\n]*$") as caught:
            call()
        assert words in str(caught.value)
    result = CliRunner().invoke(main, ["generate", str(other), "say", "--adapter", str(out)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "give that model" in result.stderr


def test_a_converted_checkpoint_takes_no_adapter(alone: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = converted(tmp_path, "bamba")
    with pytest.raises(CheckpointError, match="takes no adapter; give its source"):
        flarec.load(out, adapter=alone[1])


def test_an_adapter_of_peft_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    words = r"adapter of peft, not a model; give its model and the adapter: flarec convert \S+ --merge-adapter"
    with pytest.raises(CheckpointError, match=words):
        flarec.load(tmp_path)


def test_merging_needs_peft(alone: tuple[Path, Path], tmp_path: Path) -> None:
    """Which is never in this environment: tests_peft/ has the merges. The doctor says it too."""
    source, out = alone
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copyfile(out / "adapter" / "adapter_model.safetensors", tmp_path / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="--merge-adapter needs peft, which is not installed; pip install peft"):
        write_plain(tmp_path / "plain", source, dequantize=False, adapter=tmp_path)
    result = CliRunner().invoke(main, ["doctor", str(source), "--quick", "--merge-adapter", str(tmp_path)])
    assert result.exit_code == 1 and "converts    no: --merge-adapter needs peft" in result.stdout
    with pytest.raises(CheckpointError, match="is a noise-row adapter of flarec and cannot be merged"):
        write_plain(tmp_path / "plain", source, dequantize=False, adapter=out / "adapter")
    assert not (tmp_path / "plain").exists()


def test_a_damaged_adapter_is_named(alone: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = alone
    shutil.copytree(out, tmp_path / "out")
    path = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors was changed"):
        flarec.load(source, adapter=tmp_path / "out")


def test_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights alone, with the source's mode left as it is; copies, and a sentence, on another file system."""
    notes: list[str] = []
    source, out = adapted(tmp_path / "one", "bamba", link=True, note=notes.append)
    weights = source / "model.safetensors"
    assert weights.samefile(out / "model.safetensors") and not notes
    assert not (source / "config.json").samefile(out / "config.json")
    assert flarec.load(out).converted
    before = tree(source)
    again = adapted(tmp_path / "one", "bamba", overwrite=True)[1]
    assert again == out and not weights.samefile(out / "model.safetensors")
    assert tree(source) == before, "a checkpoint that was replaced costs its source nothing"

    def far(*_: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", far)
    source, out = adapted(tmp_path / "two", "bamba", link=True, note=notes.append)
    assert not (source / "model.safetensors").samefile(out / "model.safetensors")
    assert len(notes) == 1 and notes[0].startswith("model.safetensors is copied: it cannot be linked into")


@pytest.mark.parametrize("save", [{}, {"max_shard_size": "200KB"}])
def test_shards_and_tensors_that_transformers_passes_over(save: dict[str, Any], tmp_path: Path) -> None:
    """A multimodal source, its index, its processor and multi-token prediction: everything, in the same files."""
    source = tiny_wrapper(tmp_path, **save)
    before = tree(source)
    (tmp_path / "out").mkdir()
    for name in ("adapter_config.json", "README.md", "pytorch_model.bin.index.json", "training_args.bin", "model.py"):
        (source / name).write_text("{}")
    place_source(source, tmp_path / "out", link=False, note=lambda text: None)
    assert tree(tmp_path / "out") == before
    assert save or PREDICTION in all_tensors(tmp_path / "out")
