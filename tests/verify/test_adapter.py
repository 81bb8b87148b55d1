"""The checks of checkpoints with an adapter: they hold, and each of them can fail."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from flarec.cli import main
from flarec.ir.program import Program
from flarec.ops.streams import add_to_noisy
from flarec.verify import Subject, open_subject
from flarec.verify.adapter import (
    ar_trust_is_the_source,
    clean_rows_keep_their_bits,
    is_the_source_in_transformers,
    weights_are_the_sources,
)
from tests.checkpoints import adapted, converted
from tests.models import tiny_checkpoint

ATEN = torch.ops.aten


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, checkpoint with an adapter)"""
    return adapted(tmp_path_factory.mktemp("verified"), "lfm2")


@pytest.fixture(scope="module")
def subject(made: tuple[Path, Path]) -> Subject:
    return open_subject(made[1])


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def test_the_command(made: tuple[Path, Path]) -> None:
    source, out = made
    result = verify(out, "--source", source, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["invariant"] for row in rows] == list(range(1, 13))
    exact = {row["invariant"]: row["difference"] for row in rows if row["bound"] == 0}
    assert exact.keys() >= {8, 9, 10, 11} and set(exact.values()) == {0.0}
    assert not any(row["notes"] for row in rows)


def test_an_adapter_beside_its_model(tmp_path: Path) -> None:
    source, out = adapted(tmp_path, "lfm2", alone=True)
    result = verify(source, "--adapter", out)
    assert result.exit_code == 0 and "11 of 11 invariants hold" in result.output, result.output
    said = [line.split(":")[0] for line in result.stderr.splitlines() if line.startswith("check ")]
    assert said == [f"check {number} ({place} of 11)" for place, number in enumerate((*range(1, 10), 11, 12), 1)]
    assert "holds an adapter without its model" in verify(out).stderr


def test_a_checkpoint_without_an_adapter(tmp_path: Path) -> None:
    source, out = converted(tmp_path, "lfm2")
    result = verify(out, "--source", source)
    assert result.exit_code == 2 and "has no adapter, so its model is not its source" in result.stderr


def test_weights_that_changed(made: tuple[Path, Path], subject: Subject, tmp_path: Path) -> None:
    assert weights_are_the_sources(subject).passed
    tensors = load_file(made[0] / "model.safetensors")
    next(iter(tensors.values()))[0] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors")
    assert subject.adapted is not None
    checkpoint = dataclasses.replace(subject.adapted.checkpoint, path=tmp_path)
    other = dataclasses.replace(subject, adapted=dataclasses.replace(subject.adapted, checkpoint=checkpoint))
    assert not weights_are_the_sources(other).passed
    # a model of the same kind that is not the source
    assert weights_are_the_sources(subject, made[0]).passed
    stranger = shutil.copytree(made[0], tmp_path / "stranger")
    shutil.copy(tmp_path / "model.safetensors", stranger)
    assert not weights_are_the_sources(subject, stranger).passed


def test_the_text_is_that_of_the_source_given(made: tuple[Path, Path], subject: Subject, tmp_path: Path) -> None:
    """Not that of the checkpoint's own model, whose weights may have changed with it."""
    assert ar_trust_is_the_source(subject, 2, made[0], new_tokens=8).passed
    stranger = tiny_checkpoint(tmp_path, "lfm2", seed=1)
    result = ar_trust_is_the_source(subject, 2, stranger, new_tokens=8)
    assert not result.passed and any("transformers" in note for note in result.notes)


def test_an_adapter_on_all_rows(subject: Subject) -> None:
    """What peft would compute: clean rows move, and the text is another."""
    assert clean_rows_keep_their_bits(subject).passed and ar_trust_is_the_source(subject, cases=2).passed
    broken = dataclasses.replace(subject, train=on_all_rows(subject.train), decode=on_all_rows(subject.decode))
    result = clean_rows_keep_their_bits(broken)
    assert not result.passed and result.difference > 0.1
    assert not ar_trust_is_the_source(broken, cases=2).passed


def add_to_all(x: Tensor, noisy: Tensor, positions: Tensor, alpha: float) -> Tensor:
    """What a step adds to noisy rows, on the middle, added to every row of it."""
    return x + alpha * noisy.mean(1, keepdim=True) if positions.shape[1] else x


def on_all_rows(program: Program) -> Program:
    program = program.clone()
    choices = [
        node for node in program.calls(ATEN.where.self)
        if isinstance(node.args[1], fx.Node) and node.args[1].target is ATEN.add.Tensor
    ]
    steps = program.calls(add_to_noisy)  # of a decode step
    assert choices or steps
    for node in choices:
        node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
    for node in steps:
        node.target = add_to_all
    program.finish()
    return program


def test_an_adapter_that_is_zero_is_said(subject: Subject) -> None:
    assert subject.adapted is not None
    result = clean_rows_keep_their_bits(dataclasses.replace(subject, train=subject.adapted.train))
    assert result.passed and result.notes == ("no noisy row reads the adapter, or it is zero",)


def test_another_model_in_transformers(made: tuple[Path, Path], subject: Subject, tmp_path: Path) -> None:
    assert is_the_source_in_transformers(subject, made[0]).passed
    assert not is_the_source_in_transformers(subject, tiny_checkpoint(tmp_path, "lfm2", seed=1)).passed
