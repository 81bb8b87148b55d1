"""`flarec tune`: a setting is chosen on one half, reported on the other, and becomes the default of its mode."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flarec import api
from flarec.base.generation import GenerationOptions
from flarec.checkpoint.manifest import Manifest
from flarec.cli.chat import Conversation
from flarec.cli.tune import _why
from flarec.errors import GenerationError
from flarec.evaluate import evaluate, to_examples
from flarec.evaluation.choice import half_of
from tests.checkpoints import adapted, converted, tree
from tests.cli.conversions import flarec

NEW = 6
SMALL = ["--max-new-tokens", NEW, "--device", "cpu", "--batch", 16]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("tune"), "llama")[1]


@pytest.fixture(scope="module")
def model(path: Path) -> api.Model:
    return api.load(path)


@pytest.fixture(scope="module")
def records(model: api.Model) -> list[dict[str, Any]]:
    """Tasks of which causal decoding has the most right: what it says, but for every fourth one."""
    prompts = [f"{number} and" for number in range(16)]
    said = model.generate(prompts, mode="causal", max_new_tokens=NEW)
    return [
        {"prompt": prompt, "response": "x", "answer": "never" if number % 4 == 3 else output.text.strip(),
         "pattern": "(?s)^(.*)$"}
        for number, (prompt, output) in enumerate(zip(prompts, said, strict=True))
    ]


@pytest.fixture
def place(path: Path, records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`mine`, a checkpoint that may be written to, and `tasks.jsonl`, in the working directory."""
    for file in path.rglob("*"):
        if file.is_file():
            target = tmp_path / "mine" / file.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_chosen_setting_becomes_the_default(
    place: Path, model: api.Model, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, rounds, generate = tree(place / "mine"), [], api.Model.generate_ids

    def counted(self: api.Model, prompts: Any, options: Any, **keywords: Any) -> Any:
        rounds.append((len(prompts), options[0].mode, options[0].threshold, options[0].recheck))
        return generate(self, prompts, options, **keywords)

    monkeypatch.setattr(api.Model, "generate_ids", counted)
    result = flarec(
        "tune", "mine", "--data", "tasks.jsonl", "--threshold", 0, "--threshold", 1, "--recheck", 0, "--recheck", 1,
        "--out", "record.json", "--write", *SMALL,
    )
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert result.exit_code == 0, result.output
    assert len(rounds) == len(set(rounds)) == 2 + 4 + 1, "every half once in every setting"
    now = tree(place / "mine")
    assert {name for name in now if now[name] != files.get(name)} == {"flarec.json", "README.md"}
    assert now.keys() == files.keys(), "the lock and what was being written are gone"

    table = json.loads((place / "record.json").read_text())["modes"]["diffusion-trust"]
    examples = to_examples(records, model)
    for half in ("choosing", "reporting"):
        part = [example for example in examples if half_of(example.prompt) == half]
        causal = evaluate(model, part, mode="causal", max_new_tokens=NEW)
        assert 0 < causal["accuracy"] == table["causal"][half]["accuracy"]
        setting = table["chosen"] if half == "reporting" else {"threshold": 0.0, "recheck": 0.0}
        own = evaluate(model, part, mode="diffusion-trust", max_new_tokens=NEW, **setting)
        row = table["reported"] if half == "reporting" else table["curve"][0]
        assert {name: row[name] for name in row if name in own} == {name: own[name] for name in row if name in own}
    assert table["chosen"]["recheck"] == 1 and table["reported"]["to_causal"]["difference"] == 0
    assert table["reported"]["equal_texts"] == table["reported"]["answers"], "a recheck of 1 is causal decoding"

    again = api.load("mine")
    assert again.manifest is not None and again.manifest.decode.chosen == {"diffusion-trust": table["chosen"]}
    options = again.complete(GenerationOptions(mode="diffusion-trust"))
    assert (options.threshold, options.recheck) == (table["chosen"]["threshold"], 1.0)
    assert again.complete(GenerationOptions()).recheck == 0.0, "of other modes as before"
    said = flarec("generate", "mine", "7 and", "--mode", "diffusion-trust", "--json", *SMALL[:4])
    told = model.generate("7 and", mode="diffusion-trust", max_new_tokens=NEW, **table["chosen"])
    found = json.loads(said.stdout)[0]
    assert (found["token_ids"], found["forwards"]) == (told.token_ids, told.forwards)

    page = flarec("report", "mine", "--markdown", "page.md")
    assert page.exit_code == 0, page.output
    card, text = (place / "mine" / "README.md").read_text(), (place / "page.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith(("| choosing", "| reporting"))]
    assert len(rows) == 1 + 4 + 1 + 1
    shown = text.partition("by setting")[2].replace("\\", "")
    assert all(row in shown for row in rows)


def test_no_setting_keeps_enough(place: Path, model: api.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load", lambda *_, **__: model)
    files = tree(place / "mine")
    result = flarec(
        "tune", "mine", "--data", "tasks.jsonl", "--threshold", 0, "--recheck", 0, "--json", "--write", *SMALL
    )
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "no setting of diffusion-trust keeps 97% of causal decoding's accuracy" in result.stderr
    assert "nothing is written" in result.stderr and tree(place / "mine") == files
    assert "try a higher --recheck" in result.stderr
    table = json.loads(result.stdout)["modes"]["diffusion-trust"]
    assert table["chosen"] is None and table["reported"] is None and len(table["curve"]) == 1


def test_a_higher_recheck_is_not_advised_where_there_is_none() -> None:
    row = {"threshold": 0.5, "recheck": 1.0, "accuracy": 0.4}
    table = {"keep": 1.0, "causal": {"choosing": {"accuracy": 0.5}}, "curve": [row]}
    assert "--dtype float32" in _why("elastic", table) and "higher" not in _why("elastic", table)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--threshold", "1.5"], "1.5 is not in the range"),
    (["--threshold", "nan"], "nan is no finite number"),
    (["--recheck", "nan"], "nan is no finite number"),
    (["--keep", "nan"], "nan is no finite number"),
    (["--mode", "ar-trust"], "is not one of"),
    (["--mode", "elastic"], "train one with flarec train-head"),
    (["--samples", "2"], "2 samples at temperature 0"),
    (["--out", "mine/record.json"], "lies in mine"),
    (["--write", "--pass", "canonicalize()"], "without --pass"),
    (["--data", "easy.jsonl"], "causal decoding has none of"),
    (["--data", "other.jsonl"], "0 can be graded"),
    (["--limit", "1"], "none of them is in the half for"),
])
def test_what_is_refused(
    place: Path, model: api.Model, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(api, "load", lambda *_, **__: model)
    wrong = [{"prompt": f"{number} and", "response": "x", "answer": "never", "pattern": "(a)"} for number in range(16)]
    (place / "easy.jsonl").write_text("".join(json.dumps(record) + "\n" for record in wrong))
    (place / "other.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    result = flarec("tune", "mine", "--data", "tasks.jsonl", *SMALL, *arguments)
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert "Traceback" not in result.output


def test_a_source_has_no_settings(path: Path, place: Path) -> None:
    source = path.parent / "source" / "llama"
    assert source.is_dir()
    result = flarec("tune", source, "--data", "tasks.jsonl", *SMALL)
    assert result.exit_code == 2 and "not converted" in result.stderr
    result = flarec("tune", source, "--data", "tasks.jsonl", "--write", *SMALL)
    assert result.exit_code == 2 and "no flarec.json to --write" in result.stderr


def test_an_adapter_has_settings_of_its_own(place: Path) -> None:
    """What is written is the directory of the adapter; its model, which may be anybody's, is not touched."""
    source, adapter = adapted(place / "adapter", "llama", alone=True)
    before = tree(source), tree(adapter)
    result = flarec("tune", source, "--adapter", adapter, "--data", "tasks.jsonl", "--threshold", 0.5, "--recheck", 1,
                    "--write", *SMALL)
    assert result.exit_code == 0, result.output
    now = tree(adapter)
    assert tree(source) == before[0] and now.keys() == before[1].keys()
    assert {name for name in now if now[name] != before[1][name]} == {"flarec.json", "README.md"}
    manifest = Manifest.read(adapter)
    assert manifest is not None and manifest.decode.settings("diffusion-trust") == {"threshold": 0.5, "recheck": 1.0}


def test_a_mode_in_a_chat_has_its_own_defaults(model: api.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.manifest is not None
    own = {"diffusion-trust": {"threshold": 0.25, "recheck": 0.5}}
    decode = replace(model.manifest.decode, chosen=own)
    monkeypatch.setattr(model, "manifest", replace(model.manifest, decode=decode))
    conversation = Conversation(model, GenerationOptions(seed=3))
    assert conversation.take("/mode diffusion-trust")
    found = model.complete(conversation.options)
    assert (found.mode, found.threshold, found.recheck, found.seed) == ("diffusion-trust", 0.25, 0.5, 3)
    with pytest.raises(GenerationError):
        conversation.take("/mode elastic")
    assert conversation.options.mode == "diffusion-trust"
