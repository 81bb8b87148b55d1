"""`flarec eval`: its table, its JSON, its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flarec import api
from flarec.base.generation import GenerationOptions
from flarec.cli import main
from flarec.evaluate import evaluate, read_examples
from tests.checkpoints import converted


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("eval"), "bamba")[1]


@pytest.fixture(scope="module")
def model(path: Path) -> api.Model:
    return api.load(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    records = [
        {"prompt": f"{a} + 2 = ", "response": f"Answer: {a + 2}", "answer": str(a + 2), "pattern": "Answer: (.+)"}
        for a in range(5)
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    return file


@pytest.fixture
def run(path: Path, model: api.Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setattr(api, "load", lambda *_, **__: model)
    return lambda *arguments: CliRunner().invoke(main, ["eval", str(path), *arguments])


def test_json_is_one_object(run: Callable[..., Result], model: api.Model, data: Path) -> None:
    arguments = ["--mode", "diffusion-trust", "--threshold", "0.1", "--max-new-tokens", "7", "--batch", "2"]
    result = run("--data", str(data), "--json", *arguments)
    assert result.exit_code == 0, result.output
    options = GenerationOptions(mode="diffusion-trust", threshold=0.1, max_new_tokens=7)
    expected = evaluate(model, read_examples(data, model), options, batch=2)
    assert {**json.loads(result.stdout), "seconds": 0} == {**expected, "seconds": 0}
    assert expected["answers"] == expected["generated"] == 5


def test_the_table(run: Callable[..., Result], data: Path) -> None:
    result = run("--data", str(data), "--limit", "3", "--max-new-tokens", "4")
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert (lines["mode"], lines["records"]) == ("ar-trust", "3")
    assert "exact match         0.0% (0 of 3)" in result.stdout
    assert "tokens per forward" in result.stdout and "12 tokens" in result.stdout
    assert "nats per token" in lines["held-out"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [(None, "does not exist"), ("{", "line 1: not JSON"), ("", "no records"), ('{"text": 3}', "line 1: text is int")],
)
def test_errors(contents: str | None, message: str, run: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    if contents is not None:
        file.write_text(contents)
    result: Any = run("--data", str(file), "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr and "Traceback" not in result.stderr
