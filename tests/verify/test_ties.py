"""AR-Trust against causal decoding in bfloat16: ties are counted apart, what is none is a fault."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from flarec.base.generation import GenerationOptions
from flarec.cli import main
from flarec.verify import open_subject
from flarec.verify.decoding import ONE_BY_ONE, Parting, engine_of, near_ties
from flarec.verify.replay import Replay
from flarec.verify.ties import differences
from tests.models import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("ties"), "lfm2")


def test_the_command(model: Path) -> None:
    run = CliRunner().invoke(main, ["verify", str(model), "--dtype", "bfloat16", "--quick", "--json"])
    assert run.exit_code == 0, run.output
    (row,) = json.loads(run.stdout)
    assert row["title"] == "AR-Trust = causal, bfloat16" and row["difference"] == 0
    assert row["notes"][0].startswith("20 texts: ") and row["notes"][0].endswith(" 0 without one")
    assert row["notes"][1].startswith("causal against causal, 32 and 5 at a time, prompts whole and by 16: ")
    assert row["counts"]["texts"] == 20 and row["counts"]["without_tie"] == 0


def test_a_difference_without_a_tie_is_a_fault(model: Path) -> None:
    subject = open_subject(model, dtype=torch.bfloat16, debug=False)
    prompts, settings = [[5, 9, 30, 7], [8, 40, 41]], [GenerationOptions()] * 2
    made = engine_of(subject, "causal").generate(prompts, settings, mode="causal", max_new_tokens=6)
    assert differences(subject, prompts, settings, made, made) == (0, [])
    wrong = dataclasses.replace(made[1], token_ids=[*made[1].token_ids[:3], (made[1].token_ids[3] + 1) % 300, 0, 0])
    ties, faults = differences(subject, prompts, settings, made, [made[0], wrong])
    assert ties + len(faults) == 1 and ties == 0, "the other token is far below the best one"
    assert "T 0.0" in faults[0]


def test_partings_of_long_texts_are_judged_together(model: Path) -> None:
    """Two tokens whose logits are a rounding step apart are a tie, the best and the worst one are none; texts of
    several lengths share forwards, and of long ones the beginning is read in one pass."""
    subject = open_subject(model, dtype=torch.bfloat16, debug=False)
    rng = random.Random(0)
    partings, expected = [], []
    for length in (3, ONE_BY_ONE, ONE_BY_ONE + 1, ONE_BY_ONE + 40):
        gap, step = 1.0, 0.0
        while gap > 2 * step:  # of the two best tokens
            prompt = [rng.randrange(5, 300) for _ in range(length)]
            logits = Replay(subject, [prompt]).feed([length])[0][-1].float()
            best, near, *_, worst = logits.argsort(descending=True).tolist()
            gap, step = float(logits[best] - logits[near]), torch.finfo(torch.bfloat16).eps * float(logits.abs().max())
        assert float(logits[best] - logits[worst]) > 16 * step
        for other, tie in ((near, True), (worst, False)):
            partings.append(Parting(prompt, GenerationOptions(), [best, 7], [other, 9]))
            expected.append(tie)
    assert near_ties(subject, partings) == expected
    assert [near_ties(subject, [parting])[0] for parting in partings] == expected


def test_prompts_of_the_users_own(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    records = [{"prompt": "three plus four"}, {"messages": [{"role": "user", "content": "seven words " * 40}]}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["verify", str(model), "--dtype", "bfloat16", "--prompts", str(file)]
    run = CliRunner().invoke(main, [*arguments, "--chat", "--device", "cpu", "--json"])
    assert run.exit_code == 0, run.output
    (row,) = json.loads(run.stdout)
    assert row["counts"]["texts"] == 2 and row["compared"].startswith("2 texts, ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompts", "nowhere.txt"], "measured in float32 on the CPU, on texts of their own"),
        (["--dtype", "float32", "--chat"], "measured in float32 on the CPU"),
        (["--dtype", "bfloat16", "--chat"], "give prompts too"),
        (["--dtype", "bfloat16", "--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_options_of_another_dtype(model: Path, arguments: list[str], expected: str) -> None:
    run = CliRunner().invoke(main, ["verify", str(model), *arguments])
    assert run.exit_code == 2 and expected in run.stderr and len(run.stderr.splitlines()) == 1


def test_a_source_is_for_float32(model: Path) -> None:
    run = CliRunner().invoke(main, ["verify", str(model), "--dtype", "bfloat16", "--source", str(model)])
    assert run.exit_code == 2 and "compared with in float32" in run.stderr
