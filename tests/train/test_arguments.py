"""The arguments of a conversion are declared once: Python's signature, the command line and `--resume` follow."""

from __future__ import annotations

import inspect
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import click
import numpy as np
import pytest

from flarec.base.fields import TEXTS, option_name
from flarec.checkpoint.write import MAX_SHARD_SIZE
from flarec.cli.convert import ELSEWHERE, OPTIONS, command
from flarec.cli.options import resume_command
from flarec.errors import UsageError
from flarec.train.arguments import Arguments, ConversionKeywords
from flarec.train.convert import convert
from flarec.train.options import Options

POSITIONAL = {"source", "data"}
GIVEN: dict[str, Any] = {
    "source": "some/model", "data": ("a.jsonl:2", "b c.jsonl"), "recipe": "draft", "out": Path("out dir"),
    "overrides": ("optimizer.lr=1e-3", "save.every=2"), "steps": 5, "max_length": 64, "device": "cpu", "seed": 7,
    "resume": True, "stop_after": 3, "overwrite": True, "skip_bad_lines": True, "eval_data": ("held.jsonl",),
    "kernels": "torch", "max_shard_size": "5GB", "plugins": ("mine.py",),
    "passes": ("mine(depth=2)@after:canonicalize",),
    "prompts": Path("questions.txt"), "chat": True, "samples": 3, "temperature": 0.5, "answer_tokens": 99,
    "report_to": "tensorboard,wandb", "push_to_hub": "me/mine",
    "dequantize": True, "gguf": "model.gguf", "merge_adapter": "a lora",
    "adapter_only": True, "link": True, "debug": True,
}
"""Every argument with another value than its default."""


def parsed(words: list[str]) -> dict[str, Any]:
    """What a command line says, without running the command."""
    values = command.make_context("convert", list(words)).params
    assert values.pop("dry_run") is False
    return values


def test_a_value_for_every_argument() -> None:
    assert list(GIVEN) == [item.name for item in fields(Arguments)]
    assert not [item.name for item in fields(Arguments) if GIVEN[item.name] == item.default]


def test_python_shows_every_argument() -> None:
    shown = inspect.signature(convert).parameters
    assert set(shown) == {*GIVEN, "reporter", "progress"}
    for item in fields(Arguments):
        default = inspect.Parameter.empty if item.default is MISSING else item.default
        assert shown[item.name].default == default, item.name
    assert get_type_hints(ConversionKeywords).keys() == GIVEN.keys() - POSITIONAL


def test_the_command_line_has_every_argument() -> None:
    options = {option.name: option for option in command.params if isinstance(option, click.Option)}
    shared = {"debug"}  # every command gets it once it runs
    assert options.keys() - shared == (GIVEN.keys() - ELSEWHERE - shared) | {"dry_run"}
    for item in fields(Arguments):
        if item.name not in ELSEWHERE:
            option = options[item.name]
            assert option.opts == [option_name(item)]
            assert item.metadata["doc"] == option.help
            assert option.multiple == (get_type_hints(Arguments)[item.name] == TEXTS)
    assert Arguments(**parsed(["m"])) == Arguments("m", ())
    assert Arguments("m", ()).max_shard_size == MAX_SHARD_SIZE


def test_a_resumed_run_has_the_same_arguments() -> None:
    arguments = Options(**{**GIVEN, "resume": False, "debug": False})
    words = shlex.split(resume_command("convert", arguments, OPTIONS))
    assert words[:3] == ["flarec", "convert", "some/model"]
    expected = {**GIVEN, "stop_after": None}  # it goes on to the end
    assert parsed(words[2:]) == {name: value for name, value in expected.items() if name != "debug"}
    assert resume_command("convert", Options("m", ("d",)), OPTIONS) == "flarec convert m --data d --resume"


def test_values_of_callers() -> None:
    """Paths, single texts and numpy's numbers are as good as what the command line makes."""
    loose = {**GIVEN, "source": Path("some/model"), "eval_data": Path("held.jsonl"), "plugins": [Path("mine.py")],
             "out": "out dir", "overrides": list(GIVEN["overrides"]), "steps": np.int64(5)}
    arguments = Options(**loose)
    assert arguments == Options(**GIVEN)
    assert type(arguments.steps) is int


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seed": -1}, "seed is -1; give a whole number, at least 0"),
        ({"seed": None}, "seed is None; give a whole number"),
        ({"steps": 1.5}, "steps is 1.5; give a whole number"),
        ({"steps": True}, "steps is True"),
        ({"data": 3}, "data is 3; give text or a path"),
        ({"data": ["a", None]}, "data is None"),
        ({"recipe": {"name": "flare"}}, "recipe is {'name': 'flare'}"),
        ({"out": 1}, "out is 1"),
        ({"resume": "no"}, "resume is 'no'; give True or False"),
    ],
)
def test_wrong_values_are_said_before_anything_is_read(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=r"^[^\n]*$") as caught:
        convert(**{"source": "nowhere", "data": "nowhere.jsonl", **wrong})
    assert words in str(caught.value)


def test_the_help_needs_no_torch() -> None:
    code = "import sys, flarec.cli.convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
