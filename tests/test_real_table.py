"""examples/real/table.py and what it is made of, at tiny size: rows, choices, ratios, and what is missing."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flarec.recipe import load_recipe
from tests.models import few_checkpoint, tiny_tokenizer
from tests.real_scripts import real_script

TINY = ["--steps", "2", "--rows", "2", "--micro", "2", "--max-length", "64", "--head-rows", "8", "--head-steps", "20",
        "--limit", "2", "--max-new-tokens", "4", "--texts", "3", "--workers", "1", "--device", "cpu",
        "--set", "evaluation.prompts=2", "--set", "evaluation.max_new_tokens=4", "--commit", "abc"]


def tasks(count: int = 4) -> list[dict[str, Any]]:
    """Any answer to "copy" is right, none to "never"."""
    found = []
    for number in range(count):
        for kind, answer in (("copy", ""), ("never", "no")):
            found.append({"prompt": f"say {number}", "response": " two", "answer": answer, "pattern": "()",
                          "kind": kind, "group": "records", "tokens": 4})
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`source` says "z" whatever it read, so that a horizon head can be trained, and `data.jsonl` is what it writes."""
    monkeypatch.chdir(tmp_path)
    path = few_checkpoint(tmp_path, "bamba", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.get_input_embeddings().weight.fill_(1.0)
        model.lm_head.weight[tiny_tokenizer().convert_tokens_to_ids("z")] = 1.0
    model.save_pretrained(path)
    path.rename(tmp_path / "source")
    lines = [json.dumps({"text": "z" * (20 + number)}) + "\n" for number in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    (tmp_path / "tasks").mkdir()
    for split in ("choose", "report"):
        (tmp_path / "tasks" / f"{split}.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks()))
    prompts = [{"prompt": f"Explain this.\n\nIt counts {word}, and says so."} for word in ("red", "blue", "one", "two")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return tmp_path


def test_a_table_of_two_rows_and_one_that_fails(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = real_script(monkeypatch, "table")
    row = script.Row
    monkeypatch.setattr(script, "COMMON", ("optimizer.warmup_steps=0",))
    monkeypatch.setattr(script, "ROWS", {
        "draft": row("draft", ("1e-2",), ("diffusion.block_size=3",), ("denoise",)),
        "fluid": row("fluid", ("1e-3",), ("diffusion.earlier_block_sizes=[]",), ("elastic",), head=True),
        "no": row("nothing", ("1e-3",)),
    })
    words = ["source", "--data", "data.jsonl", "--tasks", "tasks", "--prompts", "prompts.jsonl", "--out", "table.json",
             "--work", "work", "--rate", "draft=1e-3", "--rate", "draft=1e-4", *TINY]
    assert script.main(words) == 1
    record = json.loads(Path("table.json").read_text())
    assert record["commit"] == "abc" and record["device"].endswith("CPU")
    assert record["measured"]["source"]["report"] == {"accuracy": 1.0, "tasks": 4}, "never does not count"
    assert "nothing" in record["rows"]["no"]["error"]
    draft, fluid = record["rows"]["draft"], record["rows"]["fluid"]
    assert set(draft["tried"]) == {"1e-3", "1e-4"} and draft["rate"] in draft["tried"] and not fluid["tried"]
    assert f"optimizer.lr={draft['rate']}" in draft["command"]
    for found in (draft, fluid):
        assert found["report"]["accuracy"] == found["report"]["to_source"]["ratio"] == 1.0
        assert set(found["report"]["by_group_and_kind"]) == {"records", "copy"}
        assert found["drafts"]["T=1"]["all"]["prompts"] == 2
    assert fluid["report"]["equal_answers"] == 8 and fluid["texts"]["loss_change"] == 0, "an adapter changes nothing"
    assert draft["texts"]["loss_change"] != 0 and draft["texts"]["texts"] == 3
    assert draft["denoise"]["tokens_per_forward"]["ratio"] > 0 and fluid["elastic"]["causal"] == 1.0

    for found in (draft["denoise"], fluid["elastic"]):  # of the recipe, and so of the checkpoint
        assert found["recheck"] == 1.0 and found["equal_answers"] == found["tasks"] == 4 and "0.0" in found["choose"]

    ran: list[str] = []

    def fails(command: list[str], limit: float) -> Any:
        ran.append(" ".join(command))
        return script.commands.Ran("", 1, "no", 0.0)

    monkeypatch.setattr(script.commands, "run", fails)
    assert script.main(words) == 1
    assert [name for name in ran if "--recipe nothing" not in name] == [], "what is there stays"
    assert json.loads(Path("table.json").read_text())["rows"]["draft"] == draft


def test_rates_and_thresholds_that_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen_rate = real_script(monkeypatch, "table").chosen_rate
    tried = {"a": {"accuracy": 0.70, "tokens_per_forward": 2.0}, "b": {"accuracy": 0.80, "tokens_per_forward": 1.6},
             "c": {"accuracy": 0.795, "tokens_per_forward": 1.8}}
    assert chosen_rate(tried, 0.80) == "c" and chosen_rate(tried, 0.70) == "a" and chosen_rate(tried, 0.9) == "b"
    chosen = real_script(monkeypatch, "keeps").chosen_threshold

    def seen(right: int, forwards: int) -> dict[str, Any]:
        return {"right": [1] * right + [0] * (10 - right), "tokens": [12], "forwards": [forwards]}

    assert chosen({0.5: seen(2, 4), 0.8: seen(5, 5), 0.9: seen(5, 6), 0.99: seen(9, 10)}) == 0.8
    assert chosen({0.5: seen(2, 8), 0.9: seen(9, 10)}) == 0.5


def test_every_row_is_a_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = real_script(monkeypatch, "table")
    defaults = argparse.Namespace(source="m", data=["d"], rows=16, micro=8, max_length=512, steps=100, seed=0,
                                  device="cpu", set=[])
    for row in script.ROWS.values():
        command = script.conversion(defaults, row, row.rates[0], tmp_path)
        settings = [command[place + 1] for place, word in enumerate(command) if word == "--set"]
        recipe = load_recipe(row.recipe).override(settings)
        assert recipe.optimizer.lr == float(row.rates[0]) and recipe.optimizer.warmup_steps == 10
        assert (recipe.name, recipe.diffusion.block_size) == (row.recipe, 6 if row.head else 5)
        assert "diffusion-trust" in recipe.readouts() or "denoise" not in row.parts


def test_a_model_beside_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = real_script(monkeypatch, "beside")
    found = beside.ratio([(1, 1)] * 90 + [(0, 1)] * 10)
    assert found["ratio"] == pytest.approx(0.9)
    low, high = found["interval"]
    assert low == pytest.approx(0.84, abs=0.02) and high == pytest.approx(0.95, abs=0.02)  # 0.9 -+ 1.96 * 0.03
    assert beside.ratio([(1, 0)]) == {"ratio": None, "interval": None}
    own = {"nats": [10.0, 24.0], "tokens": [5, 10]}
    told = beside.texts(own, {"nats": [9.0, 22.0], "tokens": [5, 10]})
    assert told["loss_change"] == pytest.approx(0.2)
    assert told["perplexity_to_source"] == pytest.approx(told["perplexity"] / told["source_perplexity"])
    assert told["perplexity"] == pytest.approx(math.exp(34 / 15))
    assert beside.texts(own, {"error": "no time left"}) == {"error": "no time left"}
