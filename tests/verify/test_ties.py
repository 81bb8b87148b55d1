"""AR-Trust against causal decoding in bfloat16: ties are counted apart, what is none is a fault."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from flarec.base.generation import GenerationOptions
from flarec.cli import main
from flarec.verify import open_subject
from flarec.verify.decoding import engine_of
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
    assert row["notes"][1].startswith("causal against causal, 32 and 5 at a time: ")


def test_a_difference_without_a_tie_is_a_fault(model: Path) -> None:
    subject = open_subject(model, dtype=torch.bfloat16, debug=False)
    prompts, settings = [[5, 9, 30, 7], [8, 40, 41]], [GenerationOptions()] * 2
    made = engine_of(subject, "causal").generate(prompts, settings, mode="causal", max_new_tokens=6)
    assert differences(subject, prompts, settings, made, made) == (0, [])
    wrong = dataclasses.replace(made[1], token_ids=[*made[1].token_ids[:3], (made[1].token_ids[3] + 1) % 300, 0, 0])
    ties, faults = differences(subject, prompts, settings, made, [made[0], wrong])
    assert ties + len(faults) == 1 and ties == 0, "the other token is far below the best one"
    assert "T 0.0" in faults[0]


def test_a_source_is_for_float32(model: Path) -> None:
    run = CliRunner().invoke(main, ["verify", str(model), "--dtype", "bfloat16", "--source", str(model)])
    assert run.exit_code == 2 and "compared with in float32" in run.stderr
