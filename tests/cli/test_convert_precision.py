"""`flarec convert` in bfloat16: the float32 masters are what is saved, and what is written in the source's dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import flarec as package
from flarec.checkpoint.manifest import Manifest
from flarec.train.state import StateDirectory
from tests.cli.conversions import QUICK, flarec, write_data
from tests.models import TOKENS, few_checkpoint

BF16 = ["--set", "optimizer.precision=bf16"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StateDirectory, "remove", lambda self: None)  # the last save stays beside the checkpoint
    write_data(tmp_path / "data.jsonl")
    return tmp_path


def converted(source: Path, *arguments: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Manifest]:
    """Tensors of the checkpoint, of the last save, and the manifest."""
    result = flarec("convert", source, "--data", "data.jsonl", "--out", "out", *QUICK, "--recipe", "dual", *arguments)
    assert result.exit_code == 0, result.output
    manifest = Manifest.read(Path("out"))
    assert manifest is not None
    assert f"precision: {manifest.data['precision']}" in result.stderr
    save = Path("out.partial") / (Path("out.partial") / "latest").read_text()
    return load_file("out/model.safetensors"), load_file(save / "model.safetensors"), manifest


@pytest.mark.parametrize("mixed", [True, False])
def test_masters_are_written_in_the_dtypes_of_the_source(place: Path, mixed: bool) -> None:
    """A source in bfloat16 with float32 decay rates, and one in float32."""
    source = few_checkpoint(place, "bamba")
    before = load_file(source / "model.safetensors")
    if mixed:
        before = {name: value if name.endswith("A_log") else value.bfloat16() for name, value in before.items()}
        save_file(before, source / "model.safetensors", metadata={"format": "pt"})
    written, saved, manifest = converted(source, *BF16)
    assert manifest.data["precision"] == "bf16"
    assert written.keys() == before.keys() == saved.keys()
    for name, master in saved.items():
        assert master.dtype == torch.float32
        assert written[name].dtype == before[name].dtype, name
        assert torch.equal(written[name], master.to(written[name].dtype)), name
        assert not torch.equal(written[name], before[name]), "everything was trained"
    coarse = [name for name, value in saved.items() if torch.equal(value, value.bfloat16().float())]
    assert coarse == [], "masters are finer than what was computed with"
    assert package.load("out").generate("say red one", max_new_tokens=4).mode == "ar-trust"


def test_the_mask_token_starts_at_the_mean_of_the_exact_rows(place: Path) -> None:
    source = few_checkpoint(place, "qwen3_5_text", tie_word_embeddings=True)
    table = "model.embed_tokens.weight"
    mean = load_file(source / "model.safetensors")[table][:TOKENS].mean(0)
    _, saved, _ = converted(source, *BF16, "--set", "optimizer.lr=1e-12")
    name = next(name for name in saved if saved[name].shape == (512, 64) and "mlp" not in name)
    torch.testing.assert_close(saved[name][TOKENS], mean, rtol=0, atol=1e-7)
    assert not torch.equal(saved[name][TOKENS], mean.bfloat16().float())


def test_on_a_cpu_float32_is_the_choice_of_auto(place: Path) -> None:
    _, _, manifest = converted(few_checkpoint(place, "qwen3_5_text"), "--steps", "1")
    assert manifest.data["precision"] == "float32"
    assert manifest.recipe["optimizer"]["precision"] == "auto"


def test_another_precision_cannot_continue_a_run(place: Path) -> None:
    source = few_checkpoint(place, "qwen3_5_text")
    converted(source, "--steps", "1")
    Path("out.partial").rename("new.partial")
    result = flarec("convert", source, "--data", "data.jsonl", "--out", "new", *QUICK, "--recipe", "dual",
                    "--steps", "1", *BF16, "--resume")
    assert result.exit_code != 0 and "precision was \"auto\" and is now \"bf16\"" in result.stderr
