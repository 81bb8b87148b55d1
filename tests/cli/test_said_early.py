"""Options that would do nothing, and input that cannot be used, are said before anything slow."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import flarec.train.prepare
from flarec.base.generation import GenerationOptions
from flarec.cli import main
from flarec.errors import GenerationError, UsageError
from flarec.train.convert import recipe_text
from flarec.train.options import Options
from tests.checkpoints import adapted


@pytest.mark.parametrize(("arguments", "said"), [
    (["--recipe", "draft", "--adapter-only"], "--adapter-only is for an adapter"),
    (["--recipe", "flare", "--link"], "--link is for an adapter"),
    (["--chat"], "--chat is for --prompts FILE"),
    (["--samples", "2"], "--samples is for --prompts FILE"),
    (["--temperature", "0.7"], "--temperature is for --prompts FILE"),
    (["--answer-tokens", "5"], "--answer-tokens is for --prompts FILE"),
])
def test_options_of_convert_that_would_do_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the source was opened")

    monkeypatch.setattr(flarec.train.prepare, "_open_source", refuse)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "something"}\n')
    for more in ([], ["--dry-run"]):
        given = ["convert", str(tmp_path), "--data", str(data), "--out", str(tmp_path / "out"), *arguments, *more]
        run = CliRunner().invoke(main, given)
        assert run.exit_code == 2 and said in run.stderr, run.output
    assert not (tmp_path / "out").exists()


def test_an_adapter_recipe_takes_them(tmp_path: Path) -> None:
    Options(source=str(tmp_path), recipe="adapter", adapter_only=True).load_recipe()
    with pytest.raises(UsageError, match=r"set adapter\.rank"):
        Options(source=str(tmp_path), recipe="adapter", adapter_only=True, overrides=("adapter.rank=0",)).load_recipe()


def test_options_of_another_mode_are_named() -> None:
    options = GenerationOptions(drafts="auto", threshold=0.5, temperature=1.0)
    assert options.unread("causal") == ["drafts", "threshold"]
    assert options.unread("ar-trust") == ["threshold"]
    assert options.unread("diffusion-trust") == ["drafts"]
    assert GenerationOptions().unread("causal") == []


def test_adapters_without_their_model(tmp_path: Path) -> None:
    """The command warns of drafts in causal decoding, an empty prompt has a line, and `custom_generate` of a directory
    with the adapter alone says how it is given."""
    source, out = adapted(tmp_path, "lfm2", alone=True)
    run = CliRunner().invoke(main, ["generate", str(source), "a", "--drafts", "auto", "--max-new-tokens", "1"])
    assert run.exit_code == 0 and "Warning: --drafts does nothing in mode causal" in run.stderr, run.output
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    for command in (["answers", str(source), "--out", str(tmp_path / "a.jsonl")], ["generate", str(source)]):
        run = CliRunner().invoke(main, [*command, "--prompts", str(prompts)])
        assert run.exit_code != 0 and "line 2: the prompt is empty" in run.stderr, run.output
    assert not list(tmp_path.glob("a.jsonl*"))
    model = AutoModelForCausalLM.from_pretrained(source)
    copy = shutil.copytree(out, tmp_path / "copy")
    with pytest.raises(GenerationError, match=r"give adapter=DIR with what `flarec convert --adapter-only` wrote"):
        model.generate(torch.tensor([[5, 9]]), custom_generate=str(copy), trust_remote_code=True, max_new_tokens=2)


def test_only_what_differs_of_a_recipe_is_printed() -> None:
    class Prepared:
        def __init__(self, *overrides: str) -> None:
            self.options = Options(source="source", recipe="draft", overrides=overrides, steps=7)
            self.recipe = self.options.load_recipe()

    lines = recipe_text(Prepared("optimizer.lr=0.25")).splitlines()  # type: ignore[arg-type]
    assert lines[0].startswith("recipe: draft with these changes")
    assert sorted(line.split()[0] for line in lines[1:]) == ["optimizer.lr", "optimizer.steps"]
    assert "0.25" in lines[1]
