"""`flarec convert` from a source to a checkpoint, its dry run, and what it does to directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

import flarec as package
from flarec.checkpoint.manifest import Manifest
from flarec.train.convert import READ_EVERY
from flarec.train.metrics import read_metrics
from flarec.train.progress import Reporter
from tests.checkpoints import own_folder
from tests.cli.conversions import QUICK, flarec, write_data
from tests.models import TOKENS, few_checkpoint


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("family", "recipe", "mask", "overrides"),
    [
        ("qwen3_5_text", "dual", "row", {"tie_word_embeddings": True}),
        ("kimi_linear", "flare", "row", {}),
        ("bamba", "draft", "vector", {"vocab_size": TOKENS}),  # no spare row
    ],
)
def test_a_source_becomes_a_checkpoint(
    place: Path, family: str, recipe: str, mask: str, overrides: dict[str, Any]
) -> None:
    source = few_checkpoint(place, family, **overrides)
    result = flarec("convert", source, "--data", "data.jsonl", *QUICK, "--recipe", recipe)
    assert result.exit_code == 0, result.output
    out = place / f"{family}-flarec"
    assert sorted(path.name for path in place.iterdir()) == sorted(["data.jsonl", family, out.name])
    for text in ("12 documents (messages)", "held out for evaluation: 2 documents", "optimizer", "step 6 of 6",
                 "held-out before", "held-out after", "a step of AR-Trust takes", f"checkpoint: {out.name}",
                 "flarec generate"):
        assert text in result.stderr
    assert result.stdout == ""

    manifest = Manifest.read(out)
    assert manifest is not None
    manifest.check_files(out)
    assert manifest.source.name == family
    has_experts = family == "kimi_linear"
    assert ("busiest expert clean" in result.stderr) == has_experts
    assert set(manifest.metrics.get("router", {})) == ({"clean", "noisy"} if has_experts else set())
    assert manifest.source.sha256
    assert manifest.recipe["name"] == recipe
    assert manifest.recipe["optimizer"]["steps"] == 6
    assert (manifest.mask.kind, manifest.mask.token_id) == (mask, TOKENS)
    assert manifest.pipelines["train"].startswith("canonicalize()")
    lines = list(read_metrics(out / "metrics.jsonl"))
    steps = [line for line in lines if "evaluation" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 4, 6]
    assert manifest.data["clean_tokens"] == sum(line["clean_tokens"] for line in steps)
    assert manifest.metrics["held_out"]["step 6"]["tokens_per_forward"] >= 1.0

    model = AutoModelForCausalLM.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(source)
    assert model.dtype == before.dtype
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed >= {name for name, _ in model.named_parameters()}, "everything was trained"
    loaded = package.load(out)
    assert loaded.generate("say red one", max_new_tokens=4).mode == "ar-trust"


def test_source_dtype_is_kept(place: Path) -> None:
    """Training computes in float32; the checkpoint has the source's dtype."""
    source = few_checkpoint(place, "qwen3_5_text")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    out = package.convert(
        source, ["data.jsonl"], out=place / "out", steps=1, max_length=64, device="cpu",
        overrides=["evaluation.every=0", "optimizer.batch_rows=1"],
    )
    assert out == place / "out"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_dry_run_says_what_would_run_and_writes_nothing(place: Path) -> None:
    source = few_checkpoint(place, "qwen3_5_text")
    before = sorted(place.rglob("*"))
    result = flarec("convert", source, "--data", "data.jsonl:2", *QUICK, "--dry-run")
    assert result.exit_code == 0, result.output
    assert sorted(place.rglob("*")) == before
    model = AutoModelForCausalLM.from_pretrained(source)
    parameters = sum(value.numel() for value in model.parameters())
    for text in (f"{parameters:,} parameters", "12 documents (messages)", "weight 2, about ",
                 "2 documents", "2 of 96 tokens",
                 "row, id 300", "s per step", "memory", "activations", "duplicate-streams()", "thread-cache()",
                 "block_size = 4"):
        assert text in result.stdout


def test_dry_run_says_what_is_written_and_pushed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And refuses what a run would refuse before it begins."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    source = few_checkpoint(place, "qwen3_5_text")
    words = ["convert", source, "--data", "data.jsonl", "--out", "out", *QUICK, "--dry-run"]
    more = ["--push-to-hub", "me/mine"]
    refused = flarec(*words, *more)
    assert refused.exit_code == 2 and "--push-to-hub me/mine: nobody is logged in" in refused.stderr
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    result = flarec(*words, *more, "--set", "adapter.rank=2", "--set", "objective.ar_weight=0", "--adapter-only")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert f"output       out: the adapter alone, which opens with {source}" in lines
    assert "pushed       to me/mine once it is complete" in lines
    assert not (place / "out").exists()


def test_overwrite_replaces_only_after_success(place: Path) -> None:
    source = few_checkpoint(place, "qwen3_5_text")
    own_folder(place / "out", "precious")
    arguments = ["convert", source, "--data", "data.jsonl", "--out", "out", *QUICK, "--set", "evaluation.every=0"]
    result = flarec(*arguments)
    assert (result.exit_code, "out is not empty" in result.stderr) == (2, True)
    # a learning rate that cannot work: the run fails after its start
    result = flarec(*arguments, "--overwrite", "--set", "optimizer.lr=1e38")
    assert result.exit_code == 1
    assert (place / "out" / "precious").exists()
    result = flarec(*arguments, "--overwrite")
    assert result.exit_code == 0, result.output
    assert not (place / "out" / "precious").exists()
    assert (place / "out" / "flarec.json").exists()
    assert sorted(path.name for path in place.iterdir()) == ["data.jsonl", "out", "qwen3_5_text"]


def test_evaluation_data_of_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is taken out of the training data. Losses that are read late are still all logged, in order."""
    monkeypatch.setitem(READ_EVERY, "cpu", (3, 0))
    source = few_checkpoint(place, "qwen3_5_text")
    write_data(place / "held.jsonl", 3)
    result = flarec("convert", source, "--data", "data.jsonl", "--eval-data", "held.jsonl", *QUICK, "--out", "out",
                    "--set", "save.every=10", "--set", "evaluation.prompts=4")
    assert result.exit_code == 0, result.output
    assert "held out for evaluation: 3 documents, there are no more for evaluation.prompts = 4\n" in result.stderr
    manifest = json.loads((place / "out" / "flarec.json").read_text())
    assert manifest["data"]["sources"]["1: data.jsonl"]["documents"] == 12
    lines = [(line["step"], "evaluation" in line) for line in read_metrics(place / "out" / "metrics.jsonl")]
    steps = [(step, False) for step in range(1, 7)]
    assert lines == [(0, True), *steps[:4], (4, True), *steps[4:], (6, True)]


def test_too_few_documents_to_hold_any_out(place: Path) -> None:
    """A string is one data source; the only document is trained on, and the user is told what is missing."""

    class Notes(Reporter):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    source, reporter = few_checkpoint(place, "qwen3_5_text"), Notes()
    data = write_data(place / "one.jsonl", 1)
    out = package.convert(source, data, out="out", steps=1, max_length=64, device="cpu", reporter=reporter)
    assert any(note.startswith("held out for evaluation: 0 documents, there are too few") for note in reporter.notes)
    manifest = Manifest.read(out)
    assert manifest is not None
    assert manifest.metrics["held_out"] == {}


def test_the_kernels_of_a_run_are_chosen_once_and_said(place: Path) -> None:
    """`auto` is torch on the CPU; the notes and the plan name what it stands for."""
    source = few_checkpoint(place, "bamba")
    plan = flarec("convert", source, "--data", "data.jsonl", *QUICK, "--dry-run")
    assert "kernels: torch" in plan.stderr
    assert "device       cpu, kernels torch" in plan.stdout
    wrong = flarec("convert", source, "--data", "data.jsonl", *QUICK, "--kernels", "fast")
    assert wrong.exit_code == 2
    assert "unknown kernels 'fast'; choose one of auto, torch, triton, reference" in wrong.stderr
