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

    def run(*lines: str) -> Result:
        return CliRunner().invoke(main, ["chat", str(path), *LIMIT], input="\n".join([*lines, ""]))

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
    assert chat("Hello", "/quit", "not asked").stdout == f"{first}\n"


def test_mode_and_stats(chat: Callable[..., Result], model: api.Model) -> None:
    done = chat("/stats", "/mode causal", "Hello", "/stats", "/mode fast", "/nonsense")
    assert done.exit_code == 0 and done.stdout == answers(model, "Hello", mode="causal")[0] + "\n"
    assert "no answer yet" in done.stderr and "causal: 8 tokens, 1.00 per forward" in done.stderr
    assert "Error: unknown mode fast; choose causal, ar-trust, diffusion-trust" in done.stderr
    assert "tokens/s" in done.stderr and done.stderr.count("/reset forgets") == 2


def test_an_error_leaves_the_conversation(chat: Callable[..., Result], model: api.Model) -> None:
    long = "word " * 3000
    done = chat("Hello", long, "and more")
    first, second = answers(model, "Hello", "and more")
    assert done.exit_code == 0 and done.stdout == f"{first}\n{second}\n"
    assert "leaves no room for new ones" in done.stderr
