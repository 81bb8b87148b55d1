"""`GenerationOptions`: what its fields take, what they say otherwise, and that every way in is built from them."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flarec
from flarec.api import Model
from flarec.base.fields import LARGEST
from flarec.base.generation import HOTTEST, GenerationKeywords, GenerationOptions, field_type
from flarec.cli.evaluate import command as eval_command
from flarec.cli.generate import command as generate_command
from flarec.decode import Engine
from flarec.errors import GenerationError
from flarec.evaluate import evaluate

NAMES = [item.name for item in fields(GenerationOptions)]
NUMBERS = [name for name in NAMES if field_type(name) in (int, float)]
NOT_IN_THE_TERMINAL = {"eos_ids", "suppress"}


def make(**values: Any) -> GenerationOptions:
    return GenerationOptions(**values)


@pytest.mark.parametrize("name", NAMES)
def test_none_is_the_default(name: str) -> None:
    assert make(**{name: None}) == GenerationOptions()


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("wrap", [int, np.int64, np.int32, np.array, torch.tensor, lambda x: torch.tensor([x])])
def test_numbers_of_numpy_and_torch(name: str, wrap: Any) -> None:
    value = getattr(make(**{name: wrap(1)}), name)
    assert value == 1 and type(value) is field_type(name)


@pytest.mark.parametrize("name", ["temperature", "top_p", "threshold"])
@pytest.mark.parametrize("wrap", [float, np.float32, np.float64, torch.tensor])
def test_fractions_of_numpy_and_torch(name: str, wrap: Any) -> None:
    value = getattr(make(**{name: wrap(0.25)}), name)
    assert value == 0.25 and type(value) is float


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [True, False, np.True_, torch.tensor(True), -1, math.nan, math.inf, -math.inf, 10**30, -(10**30), 10**5000, "1",
     [1, 2], torch.ones(2), np.ones(3), {}, object(), 1j, b"1", torch.tensor(math.nan)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number_in_range_is_one_line(name: str, value: Any) -> None:
    with pytest.raises(GenerationError, match=f"^{name} is .*; give a (whole )?number, ") as error:
        make(**{name: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("name", [name for name in NUMBERS if field_type(name) is int])
def test_the_limits_of_whole_numbers(name: str) -> None:
    low = GenerationOptions.__dataclass_fields__[name].metadata["low"]
    for value in (low, LARGEST):
        assert getattr(make(**{name: value}), name) == value
    for wrong in (low - 1, LARGEST + 1, 1.5, 2.0):
        with pytest.raises(GenerationError, match=name):
            make(**{name: wrong})


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("temperature", [0, 1e-300, HOTTEST], [-1e-9, HOTTEST * 1.001, 1e38, 10**15]),
        ("top_p", [1e-300, 1], [0, 1.0001]),
        ("threshold", [0, 1], [-0.1, 1.1]),
    ],
)
def test_the_limits_of_fractions(name: str, inside: list[float], outside: list[float]) -> None:
    for value in inside:
        assert getattr(make(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(GenerationError, match=f"{name} is "):
            make(**{name: value})


@pytest.mark.parametrize(("name", "wrong"), [("mode", "fast"), ("mode", 1), ("drafts", "tree"), ("drafts", ["single"])])
def test_choices(name: str, wrong: Any) -> None:
    choices = get_args(field_type(name))
    assert [getattr(make(**{name: choice}), name) for choice in choices] == list(choices)
    with pytest.raises(GenerationError, match=f"unknown {name} .*; choose .* or {choices[-1]}"):
        make(**{name: wrong})


@pytest.mark.parametrize("name", ["eos_ids", "suppress"])
def test_ids_in_every_form(name: str) -> None:
    for one in (3, np.int64(3), torch.tensor(3), [3], (3,), {3}, np.array([3]), torch.tensor([3, 3]), [np.int32(3)]):
        assert getattr(make(**{name: one}), name) == {3}
    assert getattr(make(**{name: []}), name) == frozenset()
    for wrong in (True, [True], 1.0, torch.tensor([1.5]), "3", [[3]], np.array([[3]]), torch.tensor([True]), [None]):
        with pytest.raises(GenerationError, match=f"a token id of {name} is"):
            make(**{name: wrong})


def test_stop_strings() -> None:
    for one in ("a", ["a"], ("a",), np.array(["a"]), iter(["a"])):
        assert make(stop=one).stop == ("a",)
    assert make(stop=[]).stop == ()
    for wrong, message in (
        ("", "must not be empty"), (["a", ""], "must not be empty"), ([1], "stop holds 1"), (3, "stop holds 3"),
        (torch.tensor(1.0), "stop holds 1.0"), (torch.empty(2, device="meta"), "stop holds tensor"),
        (b"a", "stop holds b"),
    ):
        with pytest.raises(GenerationError, match=message):
            make(stop=wrong)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=5),
    st.binary(max_size=3), st.complex_numbers(), st.lists(st.integers() | st.text(max_size=2) | st.none(), max_size=3),
    st.dictionaries(st.integers(), st.none(), max_size=2), st.builds(torch.tensor, st.floats()),
    st.builds(np.array, st.lists(st.floats(), max_size=2)), st.builds(object),
    st.just(torch.empty(1, device="meta")), st.just(torch.zeros(0)),
)


@given(st.dictionaries(st.sampled_from(NAMES), JUNK, max_size=3))
def test_whatever_is_given_there_are_options_or_one_line(junk: dict[str, Any]) -> None:
    try:
        options = make(**junk)
    except GenerationError as error:
        assert str(error).count("\n") == 0 and any(name in str(error) for name in junk)
        return
    for name in NUMBERS:
        value = getattr(options, name)
        assert value is None or (type(value) is field_type(name) and math.isfinite(value) and value >= 0)


def test_keywords_are_the_fields() -> None:
    """The type checker's copy: the same names, and at least the same types and None."""
    keywords, options = get_type_hints(GenerationKeywords), get_type_hints(GenerationOptions)
    assert list(keywords) == list(options)
    for name in options:
        taken = set(get_args(keywords[name]))
        assert type(None) in taken
        if field_type(name) in (int, float) or get_origin(field_type(name)) is Literal:
            assert field_type(name) in taken, name


@pytest.mark.parametrize("function", [Model.generate, Model.generate_ids, Engine.generate, evaluate])
def test_signatures_show_every_option(function: Any) -> None:
    shown = inspect.signature(function).parameters
    assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in shown.values())
    assert {name: shown[name].default for name in NAMES} == {
        item.name: item.default for item in fields(GenerationOptions)
    }


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (generate_command, set(NAMES) - NOT_IN_THE_TERMINAL),
        (eval_command, set(NAMES) - NOT_IN_THE_TERMINAL - {"stop"}),
    ],
)
def test_the_command_line_is_made_from_the_fields(command: click.Command, names: set[str]) -> None:
    options = {parameter.name: parameter for parameter in command.params if parameter.name in NAMES}
    assert set(options) == names
    for name, option in options.items():
        item = GenerationOptions.__dataclass_fields__[str(name)]
        assert isinstance(option, click.Option)
        assert (option.help, option.metavar) == (item.metadata["doc"], item.metadata["metavar"])
        assert option.default == item.default
        assert option.opts == [f"--{str(name).replace('_', '-')}"]


def test_documentation_names_every_field_and_limit() -> None:
    assert flarec.GenerationOptions is GenerationOptions
    text = inspect.getdoc(GenerationOptions) or ""
    assert all(f"\n{name} " in text for name in NAMES)
    assert "at most 1000000" in text and "2**63 - 1" in text and "causal or ar-trust or diffusion-trust" in text


def test_filled_leaves_what_is_given() -> None:
    options = GenerationOptions(threshold=0.2).filled(threshold=0.9, drafts="single")
    assert (options.threshold, options.drafts) == (0.2, "single")


def test_what_a_mode_does_not_read() -> None:
    """The mode, or modes, that stand in front of an option's meaning are those that read it."""
    given = GenerationOptions(threshold=0.5, denoising_steps=2, drafts="single", temperature=1.0)
    assert given.unread("elastic") == ["drafts", "denoising_steps"]
    assert given.unread("diffusion-trust") == ["drafts"]
    assert given.unread("ar-trust") == ["threshold", "denoising_steps"]
    assert given.unread("causal") == ["drafts", "threshold", "denoising_steps"]
    assert GenerationOptions().unread("causal") == []
