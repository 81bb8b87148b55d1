"""`flarec chat`: a conversation line by line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flarec import api
from flarec.cli import main
from tests.checkpoints import converted

LIMIT = ["--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("chat"), "bamba")[1]


@pytest.fixture(scope="module")
def model(path: Path) -> api.Model:
    return api.load(path)


@pytest.fixture
def chat(path: Path, model: api.Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setattr(api, "load", lambda path, **options: model)

    def run(*lines: str | bytes) -> Result:
        given = b"".join(line.encode() + b"\n" if isinstance(line, str) else line + b"\n" for line in lines)
        return CliRunner().invoke(main, ["chat", str(path), *LIMIT], input=given)

    return run


def answers(model: api.Model, *texts: str, **options: Any) -> list[str]:
    """A conversation through `Model.generate`."""
    messages: list[dict[str, str]] = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        answer = model.generate([messages], max_new_tokens=8, **options)[0].text
        messages.append({"role": "assistant", "content": answer})
    return [message["content"] for message in messages[1::2]]


def test_answers_know_the_conversation(chat: Callable[..., Result], model: api.Model) -> None:
    done = chat("Hello", "", "and more", "/reset", "Hello")
    first, second = answers(model, "Hello", "and more")
    assert done.exit_code == 0 and done.stdout == f"{first}\n{second}\n{first}\n"
    assert done.stderr.splitlines()[1:] == ["the conversation is forgotten"]  # no prompts where nobody types
    assert chat("Hello", "/quit", "not asked").stdout == f"{first}\n"


def test_mode_and_stats(chat: Callable[..., Result], model: api.Model) -> None:
    done = chat("/stats", "/mode causal", "Hello", "/stats", "/mode fast", "/nonsense")
    assert done.exit_code == 1 and done.stdout == answers(model, "Hello", mode="causal")[0] + "\n"
    assert "no answer yet" in done.stderr and "causal: 8 tokens, 1.00 per forward" in done.stderr
    assert "Error: unknown mode fast; choose causal, ar-trust, diffusion-trust" in done.stderr
    assert "\nall answers:\n" in done.stderr and "tokens/s" in done.stderr and done.stderr.count("/reset forgets") == 2


def test_an_error_leaves_the_conversation(chat: Callable[..., Result], model: api.Model) -> None:
    long = "word " * 3000
    done = chat("Hello", long, b"gr\xfc\xdfe", "and more")
    first, second = answers(model, "Hello", "and more")
    assert done.exit_code == 1 and done.stdout == f"{first}\n{second}\n"
    assert "leaves no room for new ones" in done.stderr
    assert "Error: the line is not UTF-8 text ('utf-8' codec can't decode byte 0xfc in position 2" in done.stderr


def test_who_types_is_asked_and_sees_errors(
    chat: Callable[..., Result], model: api.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda stream: True, raising=False)
    done = chat("/mode fast", "Hello")
    assert done.exit_code == 0 and done.stdout == answers(model, "Hello")[0] + "\n"
    assert done.stderr.splitlines()[1:] == [
        "> Error: unknown mode fast; choose causal, ar-trust, diffusion-trust, elastic", "> > ",
    ]
