"""One place in the program cache for all commands: what one captured, the others find."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import flarec
from flarec import hf_generate
from flarec.cli import main
from flarec.frontend import cache as program_cache
from flarec.frontend import export
from flarec.frontend.cache import entry_of, key_of
from flarec.frontend.export import capture, load_model
from tests.models import FAMILIES, captured, shared_model, tiny_checkpoint, tiny_model

CACHED = "capture(cached=True)"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv(program_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "programs"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_numbers_finds_the_graph_of_one_with(family: str, tmp_path: Path) -> None:
    """And the graph is that of its own capture, node by node."""
    tiny_model(family).save_pretrained(tmp_path)
    empty = load_model(tmp_path, torch.float32, "meta")
    model = load_model(tmp_path, torch.float32, "cpu")
    assert key_of(empty, family) == key_of(model, family)
    entry = entry_of(model, family)
    assert entry is not None
    entry.store(captured(family).module, shared_model(family))
    found = capture(empty, cache=True)
    assert found.history[0].step == CACHED
    assert found.graph.python_code("self").src == capture(empty).graph.python_code("self").src
    # and the other way around
    entry.path.unlink()
    entry.store(found.module, empty)
    again = capture(model, cache=True)
    assert again.history[0].step == CACHED
    assert again.graph.python_code("self").src == captured(family).graph.python_code("self").src


def test_every_command_finds_what_generate_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_checkpoint(tmp_path, "lfm2")
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    flarec.load(path)

    def refuse(*_: object) -> None:
        raise AssertionError("captured anew")

    monkeypatch.setattr(export, "_export", refuse)
    for command in (
        ["inspect", str(path)], ["doctor", str(path), "--quick", "--device", "cpu"], ["verify", str(path), "--quick"],
    ):
        run = CliRunner().invoke(main, command, catch_exceptions=False)
        assert run.exit_code == 0, run.output
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.bfloat16
    hf_generate.generate(model, torch.tensor([[5, 9, 12]]), max_new_tokens=2, mode="causal")


def test_an_activation_with_arguments_has_a_key() -> None:
    """Gemma's is a `functools.partial`; another argument is another model."""
    model = tiny_model("gemma2")
    key = key_of(model, "gemma2")
    assert key is not None
    act = next(module for module in model.modules() if hasattr(module, "act") and hasattr(module.act, "keywords"))
    act.act = type(act.act)(act.act.func, approximate="none")
    assert key_of(model, "gemma2") not in (key, None)
    act.act = type(act.act)(act.act.func, approximate=object())
    assert key_of(model, "gemma2") is None
