"""`flarec convert` with an adapter recipe: the source's own files, the trained adapter, and what opens them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import flarec as package
from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.manifest import Manifest
from flarec.verify import open_subject
from flarec.verify.adapter import clean_rows_keep_their_bits
from tests.checkpoints import tree
from tests.cli.conversions import QUICK, flarec, write_data
from tests.models import TOKENS, few_checkpoint

RECIPE = ["--recipe", "draft", "--set", "adapter.rank=4", "--set", "adapter.alpha=16", "--set", "objective.ar_weight=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    write_data(place / "data.jsonl")
    few_checkpoint(place, "bamba")
    return place


def arguments(place: Path, out: str, *more: str) -> list[object]:
    return ["convert", place / "bamba", "--data", place / "data.jsonl", "--out", place / out, *QUICK, *RECIPE, *more]


def test_a_conversion_leaves_its_source_as_it_is_by_default(place: Path) -> None:
    """Whoever names no recipe gets an adapter: every file of the source is in the checkpoint, byte for byte."""
    result = flarec("convert", place / "bamba", "--data", place / "data.jsonl", "--out", place / "default", *QUICK[:-2],
                    "--steps", "1", "--set", "evaluation.every=0")
    assert result.exit_code == 0, result.output
    whole, manifest = tree(place / "default"), Manifest.read(place / "default")
    assert {name: whole[name] for name in tree(place / "bamba")} == tree(place / "bamba")
    assert manifest is not None and manifest.adapter is not None and manifest.recipe["name"] == "adapter-dual"


def test_the_model_is_the_source_and_the_adapter_is_trained(place: Path) -> None:
    """Its own directory and the adapter alone have the same adapter; a link costs no second copy of the weights."""
    before = tree(place / "bamba")
    result = flarec(*arguments(place, "whole", "--link"))
    assert result.exit_code == 0, result.output
    alone = flarec(*arguments(place, "alone", "--adapter-only"))
    assert alone.exit_code == 0, alone.output
    assert f"flarec generate {place / 'bamba'} --adapter {place / 'alone'}" in alone.stderr.replace("\n", "")
    whole = tree(place / "whole")
    assert tree(place / "bamba") == before == {name: whole[name] for name in before}
    assert (place / "bamba/model.safetensors").samefile(place / "whole/model.safetensors")
    assert not list((place / "alone").glob("model*"))
    manifest = Manifest.read(place / "alone")
    assert manifest is not None and manifest.adapter is not None
    assert (manifest.adapter.rank, manifest.adapter.alpha, manifest.adapter.modules) == (4, 16.0, "all-linear")
    assert manifest.mask.kind == "vector" and manifest.metrics["diffusion_loss"] > 0
    config = json.loads((place / "alone/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 16.0)

    one = open_checkpoint(place / "whole").load_extra()
    other = open_checkpoint(place / "bamba", adapter=place / "alone").load_extra()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert all(one[name].any() for name in one), "everything was trained"
    subject = open_subject(place / "bamba", adapter=place / "alone")
    checked = clean_rows_keep_their_bits(subject)
    assert checked.passed and checked.notes == (), checked
    source = package.load(place / "bamba").generate("say red one", max_new_tokens=8)
    assert package.load(place / "whole").generate("say red one", max_new_tokens=8).token_ids == source.token_ids


def test_a_base_in_codes_is_nowhere_in_what_is_written(place: Path) -> None:
    """The source's files byte for byte; stopped and resumed the adapter is that of a run that never stopped, bit for
    bit."""
    before, int8 = tree(place / "bamba"), ["--set", "adapter.base=int8"]
    whole = flarec(*arguments(place, "int8", *int8))
    assert whole.exit_code == 0, whole.output
    said = " ".join(whole.stderr.split())
    assert re.search(r"base: 12 matrices of decoder layers in int8, 0.1 MB instead of 0.4 MB", said)
    assert "kept as stored in decoder layers: conv1d.weight" in said
    assert "drafts were learned over a clean stream in int8" in said
    stopped = flarec(*arguments(place, "again", *int8, "--stop-after", "3"))
    assert stopped.exit_code == 0, stopped.output
    other = flarec(*arguments(place, "again", "--resume"))
    assert other.exit_code != 0 and 'adapter.base was "int8" and is now "stored"' in " ".join(other.stderr.split())
    assert flarec(*arguments(place, "again", *int8, "--resume")).exit_code == 0
    one, two = tree(place / "int8"), tree(place / "again")
    assert before == {name: one[name] for name in before}
    assert one["adapter/adapter_model.safetensors"] == two["adapter/adapter_model.safetensors"]
    manifest = Manifest.read(place / "int8")
    assert manifest is not None and manifest.data["base"] == "int8"
    assert "| base | int8 |" in (place / "int8/README.md").read_text()


def test_random_ids_need_no_vector(place: Path) -> None:
    """The ids are in the manifest; evaluations, saves and what opens the checkpoint draw from them."""
    result = flarec(*arguments(place, "random", "--adapter-only", "--set", "mask_token=random"))
    assert result.exit_code == 0, result.output
    assert "held-out after: " in result.stderr
    manifest = Manifest.read(place / "random")
    assert manifest is not None and (manifest.mask.kind, manifest.mask.ids) == ("random", ((3, TOKENS),))
    assert manifest.decode.readouts == {"ar-trust": "causal"} and manifest.recipe["mask_token"] == "random"
    assert not list((place / "random").rglob("flarec.safetensors"))
    source = package.load(place / "bamba").generate("say red one", max_new_tokens=8)
    found = package.load(place / "bamba", adapter=place / "random").generate("say red one", max_new_tokens=8)
    assert (found.mode, found.token_ids) == ("ar-trust", source.token_ids)


def test_options_of_an_adapter_need_one(place: Path) -> None:
    before, words = tree(place), ["convert", place / "bamba", "--data", place / "data.jsonl", "--out", place / "no"]
    for option in ("--adapter-only", "--link"):
        result = flarec(*words, *QUICK, option)
        assert result.exit_code == 2
        assert f"{option} is for an adapter, and this recipe trains the model itself; set adapter.rank" in result.stderr
    assert tree(place) == before


def test_targets_that_the_model_does_not_have(place: Path) -> None:
    before = tree(place)
    result = flarec(*arguments(place, "no", "--set", "adapter.targets=foo"))
    assert result.exit_code == 2
    assert 'adapter.targets = "foo" names no linear layer of this model; set it to "all-linear"' in result.stderr
    assert tree(place) == before


def test_a_whole_checkpoint_is_no_adapter_alone(place: Path) -> None:
    """What is written is part of what a run is: a complete run of the one kind is not one of the other."""
    assert flarec(*arguments(place, "kind", "--adapter-only")).exit_code == 0
    before = tree(place)
    result = flarec(*arguments(place, "kind", "--resume"))
    assert result.exit_code != 0 and "complete" not in result.stderr
    assert tree(place) == before


def test_a_source_that_is_none_is_said_first(place: Path) -> None:
    assert flarec(*arguments(place, "checked")).exit_code == 0
    result = flarec("verify", place / "checked", "--source", place / "nowhere")
    assert result.exit_code == 2 and "nowhere" in result.stderr and "pass" not in result.stdout


def test_an_adapter_is_no_source(place: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "flarec_noisy_rows_only": "x"}')
    result = flarec("convert", tmp_path, "--data", place / "data.jsonl", "--out", place / "no", *QUICK)
    assert result.exit_code == 2 and "is a noise-row adapter of flarec and cannot be merged" in result.stderr
