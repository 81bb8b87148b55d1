"""Training and generating on a GPU with the Triton kernels: what the CPU computes, within rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import flarec as package
from flarec.frontend.export import capture
from flarec.passes import lower
from flarec.train.data.packing import RowStream
from flarec.train.loop import Trainer
from flarec.train.mask_token import choose_mask_token, initialise_mask_token
from flarec.train.objective.batch import build_batches
from flarec.train.objective.noise import step_generator
from tests.cli.conversions import QUICK, flarec, write_data
from tests.models import FAMILIES, tiny_checkpoint, tiny_model, tiny_tokenizer
from tests.train.small_run import recipe, source

pytestmark = pytest.mark.gpu


def trainer(family: str, device: str, kernels: str, *overrides: str) -> Trainer:
    """A fresh float32 model on that device, ready for its first step."""
    chosen = recipe("dual", "optimizer.batch_rows=4", "optimizer.micro_rows=2", *overrides)
    model = tiny_model(family).to(device)
    captured, tokenizer = capture(model), tiny_tokenizer()
    mask = choose_mask_token("auto", model.config, tokenizer)
    initialise_mask_token(mask, model, captured, tokenizer)
    program = lower(captured, "train", mask_vector=mask.kind == "vector", kernels=kernels)
    rows = RowStream([source(8)], max_length=chosen.data.max_length, seed=0, lookahead=4)
    return Trainer(program, chosen, mask, rows, seed=0)


def losses_and_gradients(made: Trainer) -> tuple[Tensor, dict[str, Tensor]]:
    batches = build_batches(
        made.rows.rows(4), made.recipe.diffusion, made.mask.token_id, step_generator(0, 0), micro_rows=2
    )
    losses, *_ = made.accumulate(batches)
    return losses.cpu(), {n: p.grad.cpu() for n, p in made.parameters.items() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "kernels"), [(family, kernels) for kernels in ("triton", "torch") for family in FAMILIES]
)
def test_a_float32_step_is_that_of_the_cpu(family: str, kernels: str) -> None:
    losses, gradients = losses_and_gradients(trainer(family, "cuda", kernels))
    expected, expected_gradients = losses_and_gradients(trainer(family, "cpu", "torch"))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, wanted in expected_gradients.items():
        assert float((gradients[name] - wanted).norm()) <= 2e-4 * float(wanted.norm()) + 1e-7, name


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_computed_again_on_the_gpu(family: str) -> None:
    """The gradients of everything kept; of rows that are gathered twice they are added up in any order."""
    losses, gradients = losses_and_gradients(trainer(family, "cuda", "triton", "train.memory=recompute"))
    expected, expected_gradients = losses_and_gradients(trainer(family, "cuda", "triton", "train.memory=keep"))
    assert torch.equal(losses, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, wanted in expected_gradients.items():
        assert float((gradients[name] - wanted).norm()) <= 1e-5 * float(wanted.norm()) + 1e-8, name


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_parameters_that_come_and_go_beside_the_computation(memory: str) -> None:
    """Layers are gathered on a stream of their own; what a step computes is what it computes with all of them there."""
    runs = [trainer("qwen3_5_text", "cuda", "triton", f"train.memory={memory}", f"train.shard={shard}")
            for shard in ("parameters", "optimizer")]
    for number in range(3):
        got, wanted = (run.advance().read(tiny_tokenizer()) for run in runs)
        assert got["loss"] == pytest.approx(wanted["loss"], rel=0 if number == 0 else 1e-4)
        assert got["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-3)
    cut, whole = runs
    assert sum(value.untyped_storage().nbytes() for value in cut.parameters.values()) < sum(
        value.nbytes for value in whole.parameters.values()
    )
    with cut.whole():
        for name, value in whole.parameters.items():
            torch.testing.assert_close(cut.parameters[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_stay_together(family: str) -> None:
    """Three optimizer steps: losses and gradient norms on both devices."""
    runs = [trainer(family, device, kernels) for device, kernels in (("cuda", "triton"), ("cpu", "torch"))]
    for _ in range(3):
        got, wanted = (run.advance().read(tiny_tokenizer()) for run in runs)
        assert got["loss"] == pytest.approx(wanted["loss"], rel=5e-3)
        assert got["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=5e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_and_generate_on_the_gpu(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line from a source to text, with the kernels that `auto` chooses; AR-Trust is causal text there."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data.jsonl")
    model = tiny_checkpoint(tmp_path, family)
    result = flarec("convert", model, "--data", "data.jsonl", "--out", "out", *QUICK, "--device", "cuda")
    assert result.exit_code == 0, result.output
    assert "kernels: triton" in result.stderr and "precision: bf16" in result.stderr
    loaded = package.load("out", device="cuda", dtype="float32")
    assert loaded.kernels == "triton"
    prompts = ["say red one", "say " + "two three four " * 20]
    causal = loaded.generate(prompts, mode="causal", max_new_tokens=16)
    for drafts in ("branches", "single"):
        trusted = loaded.generate(prompts, mode="ar-trust", drafts=drafts, max_new_tokens=16)
        assert [output.token_ids for output in trusted] == [output.token_ids for output in causal]
    assert loaded.generate(prompts, mode="diffusion-trust", max_new_tokens=16)[0].new_tokens == 16
