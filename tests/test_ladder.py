"""The ladder's tasks, arms and sums: what a run on a GPU relies on."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ladder import data as ladder_data
from benchmarks.ladder import pool
from benchmarks.ladder.__main__ import main
from benchmarks.ladder.arms import BLOCKS, MAIN, SEEDS, STEPS, arms
from benchmarks.ladder.source import TooSlow, Watched
from benchmarks.ladder.summary import chosen, summarised
from benchmarks.ladder.tasks import KINDS, PAIRS, SPLITS, draw_tasks
from examples.real.prompts import split_of
from flarec.recipe import load_recipe

ROOT = Path(__file__).parents[1]


def test_answers_are_right() -> None:
    """By reading them another way than they were made."""
    for task in draw_tasks("report", 90):
        prompt, response = task["prompt"], task["response"]
        if task["kind"] == "addition":
            one, other = (int(part) for part in prompt.splitlines()[0].removeprefix("add: ").split(" + "))
            assert int(response[::-1]) == one + other
        elif task["kind"] == "brackets":
            stack = []
            for letter in prompt.splitlines()[0].removeprefix("open: ") + response:
                if letter in PAIRS:
                    stack.append(letter)
                else:
                    assert PAIRS[stack.pop()] == letter
            assert not stack
        else:
            fields = dict(part.split(" = ") for part in prompt.splitlines()[0].removeprefix("record: ").split("; "))
            read = json.loads(response)
            said = {key: value if isinstance(value, list) else [value] for key, value in read.items()}
            assert {key: ", ".join(map(str, value)) for key, value in said.items()} == fields


def test_no_prompt_is_in_two_splits() -> None:
    drawn = {split: {task["prompt"] for task in draw_tasks(split, 60, seed)} for seed in (0, 1) for split in SPLITS}
    assert not drawn["train"] & drawn["choose"] and not drawn["choose"] & drawn["report"]
    assert {task["kind"] for task in draw_tasks("choose", 3)} == {*KINDS}
    assert draw_tasks("train", 9) == draw_tasks("train", 12)[:9]


def test_arms_are_recipes_and_steps_name_arms() -> None:
    found = arms()
    assert len({arm.key for arm in found}) == len(found) == len(SEEDS) * (len(MAIN) + 2 * len(BLOCKS))
    recipes = {arm.name: load_recipe(arm.recipe).override(arm.overrides) for arm in found}
    sizes = {name: recipe.diffusion.block_size for name, recipe in recipes.items()}
    assert {size for name, size in sizes.items() if "-block-" not in name} == {4}
    assert all(name in recipes for _, *pair in STEPS for name in pair)
    for step, with_it, without in STEPS:  # a step changes something
        assert recipes[with_it].to_dict() != recipes[without].to_dict(), step


def result(arm: str, seed: int, loss: float, forwards: int) -> dict[str, Any]:
    row = {"prompts": 4, "tokens": 40, "forwards": forwards, "right": 4}
    curve = {"0.7": {**row, "right": 1}, "0.9": {**row, "right": 3}, "0.99": row}
    return {
        "arm": arm, "seed": seed, "loss": {"text": loss, "tasks": 0.0}, "causal": row, "causal choose": row,
        "ar-trust": {name: {"all": row, "loop-free": row} for name in ("T=0", "T=1", "T=0 single")} | {"tasks": row},
        "diffusion-trust": {"choose": curve, "report": {**curve, "0.99": {**row, "right": 2}}},
    }


def test_differences_are_paired_by_seed() -> None:
    source = result("source", 0, 2.0, 40)
    results = [result("no-ar-loss", seed, 2.0 + noise, 20) for seed, noise in enumerate((0.5, 0.1, 0.3))]
    results += [result("flare", seed, 2.0 + noise, 16) for seed, noise in enumerate((0.42, 0.0, 0.18))]
    results += [{"arm": "draft", "seed": 0, "error": "E"}]
    found = summarised(results, source)
    assert found["failed"] == [{"arm": "draft", "seed": 0, "error": "E"}]
    assert set(found["arms"]) == {"no-ar-loss", "flare"}
    (step,) = found["steps"]
    loss = step["difference"]["AR loss change"]
    assert step["step"] == "+ AR loss" and loss["mean"] == pytest.approx(-0.1)
    half = 4.303 * math.sqrt((0.02**2 + 0 + 0.02**2) / 2 / 3)
    assert loss["interval"] == pytest.approx([-0.1 - half, -0.1 + half])
    assert step["difference"]["tokens per forward, T=0"]["mean"] == pytest.approx(40 / 16 - 2)
    values = found["arms"]["flare"]
    assert values["Diffusion-Trust, threshold"]["mean"] == pytest.approx(0.99)
    assert values["Diffusion-Trust, accuracy"]["mean"] == 0.5


def test_main_arms_of_every_seed_come_first() -> None:
    names = [name for name, *_ in MAIN]
    main, sizes = arms()[: 3 * len(MAIN)], arms()[3 * len(MAIN) :]
    assert [(arm.name, arm.seed) for arm in main] == [(name, seed) for seed in range(3) for name in names]
    assert [arm.seed for arm in sizes] == sorted(arm.seed for arm in sizes)
    assert not {arm.name for arm in sizes} & set(names)


def test_what_runs_is_claimed_once_and_what_ended_is_free(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    assert pool.claimed(tmp_path, "one") and not pool.claimed(tmp_path, "one") and pool.claimed(tmp_path, "other")
    with subprocess.Popen(["true"]) as ended:
        pass
    (tmp_path / "claims" / "one").write_text(str(ended.pid))
    assert pool.claimed(tmp_path, "one") and not pool.claimed(tmp_path, "one")
    assert {path.name for path in (tmp_path / "claims").iterdir()} == {"one", "other"}


def test_a_source_that_takes_too_long_gets_fewer_steps() -> None:
    watched = Watched(1000, 600.0)
    line = {"ar_loss": 1.0, "diffusion_loss": 0.0, "tokens_per_second": 1.0}
    for step, left in ((1, None), (59, 9000.0)):  # too early to tell
        watched.step({**line, "step": step, "seconds_left": left})
    with pytest.raises(TooSlow) as slow, watched:
        watched.step({**line, "step": 100, "seconds_left": 900.0})
    assert 560 <= slow.value.steps <= 570  # 600 s less what beginning anew takes, at a second per step
    watched = Watched(1000, 600.0)
    watched.step({**line, "step": 100, "seconds_left": 450.0})


def test_runs_in_parts_make_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What failed in one of them and not in another has not failed; sources must be the same."""
    source = {"loss": {"text": 2.0, "tasks": 0.0}}
    good, bad = result("draft", 0, 2.5, 20), {"arm": "draft", "seed": 0, "error": "E"}
    for name, results in (("one", [good]), ("two", [bad, result("flare", 0, 2.25, 16)])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"source": source, "results": results}))
    (tmp_path / "other.json").write_text(json.dumps({"source": {"loss": {"text": 1.0, "tasks": 0.0}}, "results": []}))
    first, second, other, out = (str(tmp_path / f"{name}.json") for name in ("one", "two", "other", "out"))
    main(["report", first, second, "--out", out])
    summary = json.loads(Path(out).read_text())["summary"]
    assert not summary["failed"] and summary["arms"].keys() == {"draft", "flare"}
    with pytest.raises(SystemExit, match="different source models"):
        main(["report", first, other, "--out", out])


def test_a_threshold_is_the_smallest_that_keeps_enough() -> None:
    rows = {str(at): {"right": right, "prompts": 10, "tokens": 1, "forwards": 1} for at, right in
            ((0.7, 5), (0.9, 8), (0.97, 9), (0.99, 9))}
    assert [chosen(rows, base) for base in (1.0, 0.8, 0.5)] == ["0.97", "0.9", "0.7"]
    assert chosen({name: {**row, "right": 1} for name, row in rows.items()}, 1.0) == "0.99"


def few_packages(_: Any) -> list[tuple[str, list[Path], str]]:
    """A package of every split: files of this repository."""
    files = sorted((ROOT / "benchmarks").glob("*.py"))
    names = {split_of(f"package-{number}"): f"package-{number}" for number in range(99)}
    return [(name, files[place::3], "") for place, name in enumerate(names.values())]


@pytest.mark.slow
def test_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at toy size: data, the source, an arm; then, on the packed source, nothing is done again."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ladder_data, "packages", few_packages)
    data, pieces, first, second = (tmp_path / name for name in ("data", "pieces", "first.json", "second.json"))
    main(["data", "--out", str(data), "--characters", "60000", "--tasks", "600"])
    sizes = {"texts": 2, "prompts": 2, "new_tokens": 4, "tasks": 3, "batch": 4}
    words = ["run", "--data", str(data), "--shape", "toy", "--gpus", "0", "--workers", "1", "--source-steps", "2",
             "--source-rows", "2", "--source-data", "arms", "--steps", "2", "--rows", "2", "--length", "128",
             "--seeds", "1", "--arms", "draft", "--sizes", json.dumps(sizes), "--pieces", str(pieces),
             "--time-limit", "3600"]
    main([*words, "--work", str(tmp_path / "one"), "--out", str(first)])
    (draft,) = json.loads(first.read_text())["results"]
    assert "error" not in draft and draft["arm"] == "draft" and draft["ar-trust"]["T=0"]["all"]["prompts"] == 2
    main([*words, "--work", str(tmp_path / "two"), "--out", str(second), "--done", str(first)])
    before, after = json.loads(first.read_text()), json.loads(second.read_text())
    assert (after["results"], after["source"]) == (before["results"], before["source"])
    main(["report", str(second), "--out", str(tmp_path / "all.json"), "--plot", str(tmp_path / "all.png")])
    assert json.loads((tmp_path / "all.json").read_text())["summary"]["arms"].keys() == {"draft"}
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
