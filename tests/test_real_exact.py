"""examples/real/exact.py: texts that are the source's, and one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models import few_checkpoint
from tests.real_scripts import real_script


def test_texts_that_part_without_a_tie_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, source = real_script(monkeypatch, "exact"), few_checkpoint(tmp_path, "bamba")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "exact.json"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("say one", "a" * 99, "say two")))
    words = [str(source), "--source", str(source), "--prompts", str(prompts), "--out", str(out), "--no-chat",
             "--limit", "2", "--longest", "60", "--new-tokens", "5"]
    assert script.main(words) == 0
    record = json.loads(out.read_text())
    for name in ("greedy", "sampled"):
        assert (record[name]["texts"], record[name]["tokens"], record[name]["equal"]) == (2, 10, 2)
    assert record["closest_source_choice"] > 0

    greedy = script.greedy

    def other(model: Any, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
        made, ahead = greedy(model, prompt, new_tokens)
        return [*made[:3], (made[3] + 1) % 50, *made[4:]], ahead

    monkeypatch.setattr(script, "greedy", other)
    assert script.main(words) == 1
    parted = json.loads(out.read_text())["greedy"]["parted"]
    assert [(entry["prompt"], entry["token"], entry["near_tie"]) for entry in parted] == [(0, 3, False), (1, 3, False)]
