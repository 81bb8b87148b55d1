"""`flarec convert` on two ranks: killed, interrupted and resumed it ends as one process would."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from flarec.train.metrics import read_metrics
from tests.train.ranks.conversions import STEPS
from tests.train.ranks.test_two_ranks import run_script, stored

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_script("tests.train.ranks.conversions", tmp_path_factory.mktemp("conversions"))


def test_a_killed_rank_ends_the_run_and_leaves_its_last_save(folder: Path) -> None:
    codes, left = stored(folder, "killed")
    assert codes == [0, -9]
    kind, text = stored(folder, "killed-0")
    assert kind == "TrainingError" and "rank 1 (process" in text and "with --resume if there is a save" in text
    whole = [f"two.partial/state-00000002/{name}.{kind}" for name, kind in (
        ("files", "json"), ("model", "safetensors"), ("optimizer", "safetensors"), ("state", "json"))]
    assert left == ["two.partial/latest", "two.partial/metrics.jsonl", "two.partial/run.json",
                    "two.partial/state-00000002", *whole]


def test_a_signal_to_all_ranks_ends_the_step_and_saves(folder: Path) -> None:
    """The first rank says so with its exit code, the other one ends as if nothing had been."""
    codes, left = stored(folder, "interrupted")
    assert codes == [0, 0] and stored(folder, "interrupted-0") == ("Interrupted", 3, 143)
    assert stored(folder, "interrupted-1") == str(folder / "two")
    assert {"two.partial/state-00000002", "two.partial/state-00000003"} <= {*left}


def test_the_resumed_run_ends_as_one_process_does(folder: Path) -> None:
    assert stored(folder, "finished") == ([0, 0], [])
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".pt") == [
        "data.jsonl", "one", "qwen3_5_text", "two"
    ]
    one, two = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():  # float32 after 6 steps: measured 3e-6 of the largest element
        difference = float((value - two[name]).abs().max() / value.abs().max())
        assert value.dtype == two[name].dtype and difference < 2e-5, name
    logs = [list(read_metrics(folder / name / "metrics.jsonl")) for name in ("one", "two")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss", "ar_loss", "gradient_norm", "clean_tokens", "noisy_tokens"):
            assert theirs.get(key) == (pytest.approx(ours[key], rel=1e-4) if key in ours else None)
    assert sum("evaluation" in line for line in logs[1]) == 1 + STEPS // 2
