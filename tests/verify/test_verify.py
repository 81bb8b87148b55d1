"""`flarec verify`: all invariants of a directory as a table or JSON. The measures: test_invariants.py."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import flarec.frontend.export
import flarec.verify
from flarec.checkpoint.manifest import DecodeDefaults, Manifest, MaskToken, Source
from flarec.checkpoint.write import write_checkpoint
from flarec.cli import main
from flarec.decode.horizon import HorizonProgram
from flarec.decode.recheck import Recheck
from flarec.passes import lower
from flarec.passes.embed_mask import PARAMETER
from flarec.verify import INVARIANTS, Result, Subject, open_subject, verify
from flarec.verify.subject import ROUNDING_STEPS, Comparison
from tests.models import VOCABULARY, tiny_checkpoint, tiny_model, tiny_tokenizer
from tests.passes.test_predict_horizon import SIZE, with_head


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("verify"), "bamba")


def test_a_model_that_was_not_converted(model: Path) -> None:
    """All seven apply: any drafter is exact, trained or not."""
    results = list(verify(model))
    assert [result.invariant for result in results] == list(INVARIANTS) == [1, 2, 3, 4, 5, 6, 7]
    assert all(result.passed for result in results), results


def test_bfloat16_weights_are_verified_in_float32(tmp_path: Path, model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    subject = open_subject(tmp_path)
    assert subject.train.dtype == torch.float32
    assert flarec.verify.clean_logits(subject).passed


@pytest.fixture(scope="module", params=["row", "vector"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as conversion writes it, not trained."""
    kind = request.param
    manifest = Manifest(
        source=Source("tiny"),
        mask=MaskToken(kind, 400 if kind == "row" else VOCABULARY),
        decode=DecodeDefaults(block_size=2, readouts={"ar-trust": "causal", "diffusion-trust": "block_end"}),
    )
    generator = torch.Generator().manual_seed(0)
    extra = {PARAMETER: torch.nn.Parameter(torch.randn(64, generator=generator))} if kind == "vector" else None
    out = tmp_path_factory.mktemp("converted") / kind
    return write_checkpoint(out, tiny_model("qwen3_5_text"), tiny_tokenizer(), manifest, extra)


def test_a_converted_checkpoint(converted: Path) -> None:
    subject = open_subject(converted)
    vector = converted.name == "vector"
    assert subject.block_size == 2
    assert subject.readouts == ("causal", "block_end")
    assert subject.mask_token_id == (VOCABULARY if vector else 400)
    assert subject.suppress == (() if vector else (400,))
    if vector:
        stored = load_file(converted / "flarec.safetensors")[PARAMETER]
        for program in (subject.train, subject.decode):
            assert torch.equal(program.parameters()[PARAMETER], stored)
    for result in verify(converted):
        assert result.passed, result


def test_a_recheck_that_keeps_more_than_it_may_fails(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = open_subject(converted, debug=False)
    assert subject.rechecked == {"diffusion-trust": "block_end"}
    monkeypatch.setattr("flarec.decode.engine.Recheck", lambda share: Recheck(share / 100))
    result = flarec.verify.recheck_is_causal(subject, cases=4)
    assert not result.passed and result.difference > 0 and "rechecked" in result.notes[0]


def test_elastic_decoding_is_verified_where_there_is_a_head() -> None:
    """And a text is compared for each threshold and mode."""
    program, wide, _ = with_head("lfm2")
    decode = lower(program, "decode")
    subject = Subject(
        decode, decode, None, mask_token_id=VOCABULARY - 1, block_size=SIZE, suppress=(VOCABULARY - 1,),
        rechecked={"diffusion-trust": "causal", "elastic": "causal"}, elastic=HorizonProgram(wide),
    )
    result = flarec.verify.recheck_is_causal(subject, cases=2, new_tokens=8)
    assert result.passed and result.compared.startswith("8 texts of diffusion-trust and elastic")


def test_a_converted_checkpoint_is_inspected_with_its_mask(converted: Path) -> None:
    text = CliRunner().invoke(main, ["inspect", str(converted)]).stdout
    assert ("mask vector [64]" in text) == (converted.name == "vector")


def test_a_damaged_checkpoint(converted: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for command in ("verify", "inspect"):
        run = CliRunner().invoke(main, [command, str(copy)])
        assert run.exit_code == 2
        assert "model.safetensors is truncated" in run.stderr


def test_table(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        Result(1, "clean logits = source model", "logits of 7 tokens", 1.5e-6, 3e-4, True),
        Result(2, "no leak", "gradients of 9 token pairs", 0.25, 0.0, False, ("3 pairs of tokens leak",)),
    ]
    monkeypatch.setattr(flarec.verify, "verify", lambda *args, **kwargs: iter(results))
    run = CliRunner().invoke(main, ["verify", str(model)])
    assert run.exit_code == 1
    lines = run.stdout.splitlines()
    assert re.fullmatch(r"1 +clean logits = source model +logits of 7 tokens +1\.5e-06 +3\.0e-04 +pass", lines[1])
    assert re.fullmatch(r"2 +no leak +gradients of 9 token pairs +2\.5e-01 +0\.0e\+00 +FAIL", lines[2])
    assert lines[3].strip() == "3 pairs of tokens leak"
    assert lines[-1] == "1 of 2 invariants hold"


def test_json_and_exit_code(model: Path) -> None:
    run = CliRunner().invoke(main, ["verify", str(model), "--json", "--seed", "3"])
    assert run.exit_code == 0, run.output
    data = json.loads(run.stdout)
    assert [item["invariant"] for item in data] == list(INVARIANTS)
    assert set(data[0]) == {"invariant", "title", "compared", "difference", "bound", "passed", "notes", "counts"}
    assert "7 of 7 invariants hold" in run.stderr


def test_a_quick_run_makes_every_check_and_says_so(model: Path) -> None:
    run = CliRunner().invoke(main, ["verify", str(model), "--quick"])
    assert run.exit_code == 0, run.output
    assert "7 of 7 invariants hold" in run.stdout
    said = [line for line in run.stderr.splitlines() if line.startswith("check ")]
    assert [line.split(":")[0] for line in said] == [f"check {n} ({n} of 7)" for n in range(1, 8)]
    assert "capturing" in run.stderr


def test_a_broken_model_fails(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The witness is independent: a program whose captured constants are wrong differs from transformers."""
    import flarec.verify.subject as module

    original = flarec.frontend.export.capture

    def wrong(source: object, **given: object) -> object:
        program = original(source)  # type: ignore[arg-type]
        node = next(n for n in program.graph.nodes if "linear_attention" in str(n.target))
        node.kwargs = node.kwargs | {"scale": 1.01 * float(node.kwargs["scale"])}
        return program

    monkeypatch.setattr(module, "capture", wrong)
    subject = open_subject(model)
    assert not flarec.verify.clean_logits(subject).passed
    decoded = flarec.verify.opens_in_transformers(subject)
    assert not decoded.passed and "from float64" in decoded.notes[0]
    assert flarec.verify.split_is_whole(subject).passed, "the program still agrees with itself"


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_directory_without_a_model(tmp_path: Path, name: str) -> None:
    run = CliRunner().invoke(main, ["verify", str(tmp_path / name)])
    assert run.exit_code == 2
    assert run.stderr.startswith("Error: ")
    assert run.stdout == ""


def test_a_comparison_keeps_the_worst_case_in_units_of_its_bound() -> None:
    comparison = Comparison()
    large, small = torch.full((3,), 100.0), torch.full((3,), 1.0)
    comparison.add(large, large + 1e-3)
    comparison.add(small, small + 5e-4)
    comparison.add(large, large)
    result = comparison.result(3, "title", "compared")
    assert result.difference == pytest.approx(5e-4, rel=1e-3)
    assert result.bound == pytest.approx(ROUNDING_STEPS * 2**-23)
    assert not result.passed


def test_nan_never_passes() -> None:
    comparison = Comparison()
    comparison.add(torch.ones(2), torch.tensor([1.0, float("nan")]))
    comparison.add(torch.ones(2), torch.ones(2))
    assert not comparison.result(1, "title", "compared").passed


def test_float64_is_held_to_float64() -> None:
    comparison = Comparison()
    one = torch.ones(2, dtype=torch.float64)
    comparison.add(one, one + 1e-9)
    assert not comparison.result(1, "title", "compared").passed
