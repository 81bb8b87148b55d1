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
from flarec.evaluation.record import hash_of_data
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
    assert lines["accuracy"] == "0.0% (0 of 3; 95 %: 0.0% to 56.1%)"
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


def test_samples_beside_the_source(
    path: Path, model: api.Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AR-Trust of the checkpoint against its own causal decoding: every text is equal, so nothing differs."""
    monkeypatch.setattr(api, "load", lambda *_, **__: model)
    out = tmp_path / "record.json"
    arguments = ["--samples", "3", "--temperature", "0.9", "--seed", "5", "--max-new-tokens", "6", "--limit", "4"]
    first = CliRunner().invoke(main, [
        "eval", str(path), "--data", str(data), *arguments, "--against", str(path), "--out", str(out),
    ])
    assert first.exit_code == 0, first.output
    assert "equal texts         12 of 12" in first.stdout and "p = 1 (better on 0, worse on 0" in first.stdout
    record = json.loads(out.read_text())
    assert [answer["seed"] for answer in record["answers"][:4]] == [5, 6, 7, 5]
    assert record["settings"]["thinking"] is None
    assert record["result"]["samples"] == 3 and record["against"]["paired"]["difference"] == 0
    assert str(tmp_path) not in json.dumps({name: record[name] for name in ("model", "data", "options", "settings")})

    again = ["eval", str(path), "--data", str(data), "--repeat", str(out)]
    repeated = CliRunner().invoke(main, again)
    assert repeated.exit_code == 0 and "the same numbers as in the record" in repeated.stderr
    refused = CliRunner().invoke(main, [*again, "--seed", "6"])
    assert refused.exit_code == 2 and "--seed is in the record" in refused.stderr
    for switch in ("--thinking", "--no-thinking", "--execute"):
        assert f"Error: {switch} is in the record" in CliRunner().invoke(main, [*again, switch]).stderr
    record["result"]["forwards"] += 1
    out.write_text(json.dumps(record))
    changed = CliRunner().invoke(main, again)
    assert changed.exit_code == 1 and "forwards was" in changed.stderr
    data.write_text(data.read_text().replace("Answer", "answer"))
    assert "is not the data of" in CliRunner().invoke(main, again).stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: "{", "is not JSON"), (lambda table: "[]", "is no record"),
        (lambda table: table | {"format_version": 9}, "format version 9"),
        (lambda table: table | {"options": 3}, "no table options"),
        (lambda table: table | {"options": {"heat": 1}}, "the option heat"),
        (lambda table: table | {"options": {"temperature": -1}}, "temperature"),
        (lambda table: table | {"settings": table["settings"] | {"samples": 0}}, "samples in --repeat"),
        (lambda table: table | {"settings": table["settings"] | {"execute": 1}}, "execute 1"),
        (lambda table: table | {"model": {"name": "another"}}, "is not the model"),
    ],
)
def test_records_that_cannot_be_repeated(
    change: Callable[[dict[str, Any]], Any], message: str, run: Callable[..., Result], data: Path, tmp_path: Path
) -> None:
    settings = {"samples": 1, "limit": None, "batch": 8, "execute": False}
    table = {
        "record": "flarec evaluation", "format_version": 1, "model": {}, "data": {"sha256": hash_of_data(data)},
        "options": {}, "settings": settings, "result": {},
    }
    changed = change(table)
    file = tmp_path / "record.json"
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    result = run("--data", str(data), "--repeat", str(file))
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output


def test_python_answers_run_only_when_told_to(run: Callable[..., Result], data: Path, recwarn: Any) -> None:
    data.write_text(json.dumps({"prompt": "def f():", "response": " return 1", "tests": "f()"}))
    plain = run("--data", str(data), "--json", "--max-new-tokens", "3")
    assert json.loads(plain.stdout)["answers"] == 0 and "--execute" in plain.stderr
    graded = run("--data", str(data), "--json", "--max-new-tokens", "3", "--execute")
    assert json.loads(graded.stdout)["answers"] == 1 and "--execute" not in graded.stderr


def test_samples_need_a_temperature(run: Callable[..., Result], data: Path) -> None:
    result = run("--data", str(data), "--samples", "2")
    assert result.exit_code == 2 and "give a temperature" in result.stderr


def test_lm_eval_is_asked_for() -> None:
    result = CliRunner().invoke(main, ["lm-eval", "--model", "flarec", "--help"])
    assert result.exit_code == 2 and "pip install 'flarec[lm-eval]'" in result.stderr
