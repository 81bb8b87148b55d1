"""Two ranks do what one does: the same losses and weights to rounding, saves that go back and forth, one end for both.

The processes are those of `tests.train.ranks.scenarios`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_repository import ROOT
from tests.train.ranks.scenarios import CASES, CUT, RESUMED, STEPS

pytestmark = pytest.mark.xdist_group("ranks")
BOUNDS = {"flare": 1e-13, "draft": 1e-5, "adapter": 1e-13, "codes": 1 / 254}
"""Of every tensor's largest element. Measured 3e-15, 3e-7 and 3e-15: everything is float64 but the gates, which the
model makes float32. The passes of `flare` and `adapter` are the same on two ranks, those of `draft` have fewer rows.
`codes` is float32 with 8-bit moments, which are one apart at a tie."""
NUMBERS = {"codes": 1e-5}
"""Of every number of a step, instead of `BOUNDS` for the loss and 1e-6. Measured 1.1e-6."""


def run_script(module: str, place: Path) -> Path:
    """A process of its own, which has seen no GPU and forks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    words = [sys.executable, "-m", module, str(place)]
    found = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_script("tests.train.ranks.scenarios", tmp_path_factory.mktemp("ranks"))


def stored(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=False)


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two results, as a share of its tensor's largest element."""
    worst = 0.0
    for part in ("model", "optimizer", "computed"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            assert (value.shape, value.dtype) == (other[part][name].shape, other[part][name].dtype), name
            difference = float((value.double() - other[part][name].double()).abs().max())
            worst = max(worst, difference / max(float(value.abs().max()), 1e-30))
    return worst


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one(name: str, folder: Path) -> None:
    """Losses, gradient norms, router counts, weights, moments."""
    one, two = stored(folder, f"{name}-one"), stored(folder, f"{name}-two-0")
    assert len(one["log"]) == STEPS
    for expected, found in zip(one["log"], two["log"], strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key == "router":
                assert found[key]["layers"] == value["layers"] and value["noisy"] != value["clean"]
            if isinstance(value, float):
                bound = NUMBERS.get(name, BOUNDS[name] if key == "loss" else 1e-6)
                assert found[key] == pytest.approx(value, rel=bound), key
    if BOUNDS[name] < 1e-10:  # routers choose what they chose
        assert [line["router"] for line in one["log"]] == [line["router"] for line in two["log"]]
    assert furthest(one, two) < BOUNDS[name]
    trained = {key.removesuffix(".step") for key in two["optimizer"] if key.endswith(".step")}
    assert len(trained) > 5
    assert any("lora" in key for key in trained) == (name == "adapter"), "what has no gradient is left alone"


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_bit_for_bit(name: str, folder: Path) -> None:
    """What they computed with, and what they logged; the first one has what is saved, the other none of it."""
    first, second = (stored(folder, f"{name}-two-{rank}") for rank in range(2))
    assert second["log"] == first["log"]
    assert [key for key, value in second["computed"].items() if not torch.equal(value, first["computed"][key])] == []
    assert second["model"] == second["optimizer"] == {}


def test_codes_do_not_depend_on_the_ranks(folder: Path) -> None:
    """Of blocks of the same numbers, from sums in another order: all but a few at ties, and scales to rounding."""
    results = [stored(folder, f"codes-{which}") for which in ("one", "two-0")]
    one, two = (result["optimizer"] for result in results)
    codes = [(one[key].flatten(), two[key].flatten()) for key in one if one[key].dtype == torch.uint8]
    first, second = (torch.cat(values).int() for values in zip(*codes, strict=True))
    assert len(first) > 4e5 and int((first - second).abs().max()) <= 1
    assert float((first != second).float().mean()) < 1e-3, "measured: 7e-5"
    scales = [key for key in one if key.endswith("_scale")]
    assert len(scales) == len(codes)
    for key in scales:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=0)
    for name, value in results[0]["model"].items():
        assert float((value - results[1]["model"][name]).abs().max()) < 1e-3 * float(value.abs().max()), name


@pytest.mark.parametrize("name", RESUMED)
def test_two_ranks_resume_bit_for_bit(name: str, folder: Path) -> None:
    whole, again = stored(folder, f"{name}-two-0"), stored(folder, f"{name}-again-0")
    assert again["log"] == whole["log"][-len(again["log"]) :] and again["log"]
    assert furthest(whole, again) == 0


@pytest.mark.parametrize("name", RESUMED)
def test_a_save_goes_from_two_ranks_to_one_and_back(name: str, folder: Path) -> None:
    """Step 1 by two ranks, step 2 by one, step 3 by two: as if two had taken all."""
    whole, mixed = stored(folder, f"{name}-two-0"), stored(folder, f"{name}-mixed-0")
    assert [line["step"] for line in mixed["log"]] == [STEPS]
    assert furthest(whole, mixed) < BOUNDS[name]


@pytest.mark.parametrize("name", [name for name in CUT if name.endswith("-cut")])
def test_parameters_in_parts_change_no_bit(name: str, folder: Path) -> None:
    """Losses, norms, masters, moments, and what a program that reads all parameters finds."""
    whole, cut = (stored(folder, f"{which}-two-0") for which in (CUT[name][0], name))
    assert cut["log"] == whole["log"] and furthest(whole, cut) == 0
    assert stored(folder, f"{name}-two-1")["computed"] == {}, "the first rank alone reads"


@pytest.mark.parametrize("name", RESUMED)
def test_a_save_goes_from_whole_parameters_to_parts_and_back(name: str, folder: Path) -> None:
    expected = stored(folder, f"{name}-two-0")
    for place in (f"{name}-two", f"{name}-cut-two"):
        found = stored(folder, f"{place}-other-0")
        assert found["log"] == expected["log"][-len(found["log"]) :] and furthest(expected, found) == 0


@pytest.mark.parametrize("name", ["flare-cut", "adapter-cut", "dense-cut", "codes-cut"])
def test_between_steps_a_rank_has_its_part(name: str, folder: Path) -> None:
    """Whole are embedding, head and last norm. What the trainer states has two layers more, those of a moment."""
    for rank in range(2):
        whole, cut = (stored(folder, f"{which}-two-{rank}")["bytes"] for which in (CUT[name][0], name))
        assert whole["there"] == whole["whole"] == cut["whole"] and not whole["frozen"]
        layers = cut["whole"] - cut["there"]
        assert layers > cut["whole"] / 5
        assert cut["frozen"] == (pytest.approx(layers / 2, rel=0.2) if name == "adapter-cut" else 0)
        moments_of_those_without_a_gradient = whole["stated"] - whole["there"] - whole["beside"]
        assert 0 <= moments_of_those_without_a_gradient < 0.1 * whole["stated"]
        held = cut["there"] + cut["frozen"] + cut["beside"] + moments_of_those_without_a_gradient
        assert 0 < cut["stated"] - held <= layers


def test_an_error_of_one_rank_ends_both_and_is_told_once(folder: Path) -> None:
    assert stored(folder, "codes")["error"] == [0, 0]
    assert stored(folder, "error-0") == ("TrainingError", "rank 1 stopped: record 7 cannot be read")
    assert stored(folder, "error-1") == ("ToldElsewhere", "record 7 cannot be read")


def test_a_number_that_is_not_finite_on_one_rank_is_named_by_all(folder: Path) -> None:
    kind, text = stored(folder, "broken-0")
    assert kind == "TrainingError"
    assert "the loss of step 2 is not finite (row 2 of 4, documents that begin" in text and "row 3 of 4" in text
    assert stored(folder, "broken-1") == ("ToldElsewhere", text)


@pytest.mark.parametrize(
    ("name", "rank", "reason"),
    [
        ("killed", 0, r"rank 1 \(process \d+\) has ended without a word: it was killed, or memory ran out"),
        ("first-killed", 1, r"rank 0 .*(has ended without a word|cannot be reached any more): it was killed"),
    ],
)
def test_a_killed_rank_is_named_by_the_other(name: str, rank: int, reason: str, folder: Path) -> None:
    codes = stored(folder, "codes")[name]
    assert codes[rank] == 0 and codes[1 - rank] == -9
    kind, text = stored(folder, f"{name}-{rank}")
    assert kind == "TrainingError" and re.match(reason, text) and "start all ranks again, with --resume" in text
