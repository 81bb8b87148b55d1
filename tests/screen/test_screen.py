"""`flarec screen`: every mix starts from the source's weights and is measured on one split; oracles are a conversion of
the same steps and `flarec.evaluate`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import flarec as package
from flarec.checkpoint.manifest import Manifest
from flarec.cli.screen import _table
from flarec.evaluate import evaluate, read_examples
from flarec.screen.arguments import ScreenArguments
from flarec.screen.mixes import proxy
from flarec.screen.screen import MixScore, Screening
from tests.checkpoints import tree
from tests.cli.conversions import WORDS, flarec, write_data
from tests.models import TOKENS, tiny_checkpoint

SHORT = [
    "--recipe", "flare", "--steps", "4", "--max-length", "96", "--device", "cpu", "--lr", "3e-3", "--set",
    "optimizer.batch_rows=2",
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path, "qwen3_5_text").rename(tmp_path / "source")
    write_data(tmp_path / "good.jsonl", 8)  # no two are the same
    records = [{"prompt": f"{number}?", "response": "Z%#" * 9} for number in range(10)]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def write_tasks(path: Path) -> Path:
    records = [
        {"messages": [{"role": "user", "content": f"say {word} now"}, {"role": "assistant", "content": f"{word} now"}],
         "answer": "now", "pattern": "(now)"}
        for word in WORDS
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_best_mix_is_found_and_converted_with(place: Path) -> None:
    tasks = write_tasks(place / "tasks.jsonl")
    split = ["--eval-data", tasks.name, "--held-out", "6", "--max-new-tokens", "4"]
    mixes = {"bad": "bad.jsonl:3,good.jsonl", "good": "good.jsonl"}  # nothing of the first may be left for the second
    given = [word for name, files in mixes.items() for word in ("--mix", f"{name}={files}")]
    result = flarec("screen", "source", *given, *SHORT, *split, "--json", "--convert", "out", "--set",
                    "optimizer.steps=2", "--set", "evaluation.every=0")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = {row["name"]: row for row in found["mixes"]}
    assert (found["best"], found["by"], found["checkpoint"]) == ("good", "loss", "out")
    assert found["split"] == "6 documents of tasks.jsonl (6 tasks)"
    assert rows["good"]["loss"] < rows["bad"]["loss"] < found["source"]["loss"]
    assert found["lead"]["mean"] > 0 and found["lead"]["standard_error"] > 0
    manifest = Manifest.read(place / "out")
    assert manifest is not None and list(manifest.data["sources"]) == ["1: good.jsonl"]
    assert manifest.recipe["objective"]["diffusion_weight"] == 1.0
    assert sorted(path.name for path in place.iterdir()) == ["bad.jsonl", "good.jsonl", "out", "source", "tasks.jsonl"]

    def oracle(path: Path) -> tuple[Any, Any]:
        model = package.load(path)
        model.engine.suppress = frozenset([TOKENS])  # the row that the conversion takes for its mask token
        values = evaluate(model, read_examples(tasks, model, limit=6), mode="causal", max_new_tokens=4)
        return pytest.approx(values["loss"], abs=1e-5), values["accuracy"]

    assert (found["source"]["loss"], found["source"]["accuracy"]) == oracle(place / "source")
    plain = package.convert(
        "source", "good.jsonl", out="plain", recipe="flare", steps=4, max_length=96, device="cpu",
        overrides=["objective.diffusion_weight=0", "learning_rate=3e-3", "optimizer.batch_rows=2", "evaluation.every=0",
                   "optimizer.warmup_steps=0"],
    )
    assert (rows["good"]["loss"], rows["good"]["accuracy"]) == oracle(plain)


def test_the_split_is_in_no_mix(place: Path) -> None:
    """Documents that other files hold as well are left out of them too."""
    (place / "copy.jsonl").write_text((place / "good.jsonl").read_text())
    result = flarec("screen", "source", "--mix", "a=good.jsonl", "--mix", "b=copy.jsonl,bad.jsonl", *SHORT,
                    "--held-out", "3", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["split"] == "3 documents taken out of every mix (0 tasks)"
    counts = {row["name"]: row["documents"] for row in found["mixes"]}
    notes = [line for line in result.stderr.splitlines() if "are in the split too" in line]
    # one document was drawn from each file; those of good.jsonl and copy.jsonl are in the other one as well
    assert notes == [f"{name}: 1 documents are in the split too and left out of every mix"
                     for name in ("good.jsonl", "copy.jsonl")]
    assert counts == {"a": 6, "b": 6 + 9}
    assert found["mixes"][0]["accuracy"] is None


def test_a_split_that_is_smaller_than_asked_for(place: Path) -> None:
    mixes = ["--mix", "a=good.jsonl", "--mix", "b=bad.jsonl"]
    for split, size, why in (
        (["--held-out", "6000"], 9, "every file keeps at least half of its own"),
        (["--held-out", "9", "--eval-data", write_tasks(place / "tasks.jsonl").name], 8, "--eval-data has no more"),
    ):
        result = flarec("screen", "source", *mixes, *SHORT, *split, "--steps", "1", "--max-new-tokens", "1")
        assert result.exit_code == 0, result.output
        assert f"split: {size} documents" in result.stderr
        assert f"--held-out {split[1]} is more than there is to measure on: {why}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mix", "a=good.jsonl", "--mix", "b=bad.jsonl", "--max-length", "9", "--set", "max_length=8"],
         "--max-length 9 and --set max_length=8 are the same key"),
        (["--mix", "a=good.jsonl"], "1 mixes are given"),
        (["--mix", "good.jsonl", "--mix", "b=bad.jsonl"], "write NAME=PATH"),
        (["--mix", "a=good.jsonl", "--mix", "a=bad.jsonl"], "--mix a=... is given twice"),
        (["--mix", "a=good.jsonl,good.jsonl:2", "--mix", "b=bad.jsonl"], "names a file twice"),
        (["--mix", "a=nowhere.jsonl", "--mix", "b=bad.jsonl"], "nowhere.jsonl does not exist"),
        (["--mix", "a=good.jsonl", "--mix", "b=bad.jsonl", "--by", "speed"], "give loss or accuracy"),
        (["--mix", "a=good.jsonl", "--mix", "b=bad.jsonl", "--by", "accuracy"], "needs --eval-data"),
        (["--mix", "a=good.jsonl", "--mix", "b=bad.jsonl", "--convert", "source"], "source"),
        (["--mix", "a=good.jsonl", "--mix", "b=bad.jsonl", "--set", "optimizer.lr=x"], "optimizer.lr = 'x'"),
    ],
)
def test_bad_input_is_said_before_the_model_is_loaded(place: Path, arguments: list[str], words: str) -> None:
    before = tree(place)
    result = flarec("screen", "source", *arguments)
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr
    assert "loading" not in result.stderr
    assert tree(place) == before


def test_one_process(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    result = flarec("screen", "source", "--mix", "a=good.jsonl", "--mix", "b=bad.jsonl")
    assert (result.exit_code, "screen is one process" in result.stderr) == (2, True), result.stderr


def test_the_short_run_is_plain_fine_tuning(tmp_path: Path) -> None:
    """By the recipe's rows and numbers; a recipe for an adapter lends its rate to nobody."""
    overrides = ("optimizer.batch_rows=4", "adam_beta2=0.95", "warmup_ratio=0.5", "max_length=64")
    arguments = ScreenArguments("m", steps=30, recipe="adapter", overrides=overrides, held_out=5)
    recipe = proxy(arguments, [], tmp_path).load_recipe()
    assert (recipe.adapter.rank, recipe.objective.ar_weight, recipe.objective.diffusion_weight) == (0, 1.0, 0.0)
    optimizer = recipe.optimizer
    assert (optimizer.steps, optimizer.lr, optimizer.warmup, optimizer.batch_rows) == (30, 1e-5, 3, 4)
    assert (optimizer.betas, optimizer.schedule, recipe.data.max_length) == ((0.9, 0.95), "linear", 64)
    assert (recipe.evaluation.prompts, recipe.evaluation.every) == (5, 30)
    named = ScreenArguments("m", recipe="draft", overrides=("optimizer.lr=2e-5",))
    assert proxy(named, [], tmp_path).load_recipe().optimizer.lr == 2e-5
    assert proxy(ScreenArguments("m", lr=1e-3), [], tmp_path).load_recipe().optimizer.lr == 1e-3


def test_the_table_says_how_it_was_chosen() -> None:
    def scored(name: str, *losses: float) -> MixScore:
        return MixScore(name, sum(losses) / len(losses), losses, 0.25, 4, 7, 1234, 2.0)

    mixes = scored("one", 1.0, 2.0), scored("two", 1.5, 2.7)
    clear = Screening(scored("(source)", 3.0, 4.0), mixes, "loss", "2 documents of x (4 tasks)", 9, 0, 1e-5, (0.6, 0.1))
    lines = _table(clear)
    assert [line.split()[:2] for line in lines[1:3]] == [["1", "one"], ["2", "two"]]
    assert "25.0% of 4" in lines[1] and "1,234" in lines[1]
    said = "\n".join(lines[4:])
    assert "chosen by held-out loss on one split: 2 documents of x (4 tasks); 9 steps each, lr 1e-05, seed 0" in said
    assert "one against two: loss per token lower by 0.6000 +- 0.1000" in said
    assert "within the noise" not in said
    unclear = replace(clear, lead=(0.1, 0.1))
    assert "noise of this split: more --steps or a larger --held-out would tell" in "\n".join(_table(unclear))
    small = "\n".join(_table(replace(unclear, whole=False)))
    assert "more --steps or more documents to measure on (--eval-data) would tell" in small
    assert "--held-out" not in small
    assert "within the noise" in "\n".join(_table(replace(clear, lead=(0.1, None))))
