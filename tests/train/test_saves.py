"""Saves of the training state: nothing that is not as it was written is trained on; the save before takes its place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flarec.base.hashes import FileEntry
from flarec.errors import CheckpointError, TrainingError, UsageError
from flarec.train import saves
from flarec.train.saves import FILES, MODEL, STATE, SavedState, check_tensors, check_values, read_save
from flarec.train.state import StateDirectory, differences
from tests.crashes import FAILURES, Watch, failing

FIRST, SECOND = "state-00000003", "state-00000006"
EVALUATION = {"tokens_per_forward": 1.5, "all_masked_accuracy": [0.5, None], "one_minus_tv": [0.1, 0.2], "ar_loss": 2.0,
              "expected_accepted": 1.2}
VALUES: dict[str, Any] = {
    "step": 6,
    "rows": {},
    "evaluations": {"0": EVALUATION, "4": EVALUATION},
    "totals": {"clean_tokens": 10, "noisy_tokens": 7},
    "last": {"ar_loss": 1.0, "diffusion_loss": 2.0},
}


def state(step: int) -> SavedState:
    weights = torch.arange(4, dtype=torch.float32) + step
    moments = {"w.step": torch.tensor(float(step)), "w.exp_avg": weights / 2, "w.exp_avg_sq": weights**2}
    return SavedState({"w": weights}, moments, {**VALUES, "step": step})


@pytest.fixture
def directory(tmp_path: Path) -> StateDirectory:
    made = StateDirectory(tmp_path / "out.partial")
    made.create({})
    for step in (3, 6):
        made.save(step, state(step))
    return StateDirectory(made.path)


def resumed(directory: StateDirectory) -> tuple[int, list[str]]:
    """(step that a run continues from, lines that it says)"""
    lines: list[str] = []
    found = directory.latest(lines.append)
    assert found is not None
    step = found.values["step"]
    assert torch.equal(found.model["w"], state(step).model["w"])
    assert {name: value.tolist() for name, value in found.optimizer.items()} == {
        name: value.tolist() for name, value in state(step).optimizer.items()
    }
    return step, lines


def test_a_whole_save_is_taken_without_a_word(directory: StateDirectory) -> None:
    assert resumed(directory) == (6, [])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "files.json"])
def test_every_flipped_byte_and_every_truncation_is_noticed(directory: StateDirectory, name: str) -> None:
    """Or changes nothing: white space in the list of files."""
    path = directory.path / SECOND / name
    data = path.read_bytes()
    listed = json.loads(data) if name == FILES else None
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        for damaged in (bytes(flipped), data[:place]):
            path.write_bytes(damaged)
            step, lines = resumed(directory)
            if step == 6:
                assert listed is not None and json.loads(damaged) == listed
            else:
                named = SECOND if listed else f"{SECOND}/{name}"  # a damaged list blames the file that it describes
                assert [line.startswith("damaged: ") and named in line for line in lines] == [True]
                assert f"continuing from the save before, {FIRST}" in lines[0]


def test_every_damaged_pointer_leads_to_a_whole_save(directory: StateDirectory) -> None:
    path = directory.path / "latest"
    data = path.read_bytes()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        for damaged in (bytes(flipped), data[:place]):
            path.write_bytes(damaged)
            step, lines = resumed(directory)
            assert step == 6 and len(lines) == 1, damaged


def link(save: Path) -> None:
    (save / MODEL).unlink()
    (save / MODEL).symlink_to(save)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "no folder": lambda save: shutil.rmtree(save),
    "no list": lambda save: (save / FILES).unlink(),
    "no weights": lambda save: (save / MODEL).unlink(),
    "a list without weights": lambda save: edit(save / FILES, lambda table: table.pop(MODEL)),
    "a list that leads elsewhere": lambda save: edit(save / FILES, lambda table: table.update({"../x": table[MODEL]})),
    "a list of something else": lambda save: edit(save / FILES, lambda table: table.update({MODEL: [1]})),
    "a list with other types": lambda save: edit(save / FILES, lambda table: table[MODEL].update(bytes=True)),
    "weights are a link to a folder": link,
    "another step": lambda save: rewrite(save, {**VALUES, "step": 7}),
    "no step": lambda save: rewrite(save, {}),
    "a step that is a word": lambda save: rewrite(save, {**VALUES, "step": "6"}),
    "no table": lambda save: rewrite(save, [1]),
    "deep": lambda save: write_state(save, "[" * 100_000),
}


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def write_state(save: Path, text: str) -> None:
    """With its right hash: this is no damage."""
    (save / STATE).write_text(text)
    entry = FileEntry.of(save / STATE)
    edit(save / FILES, lambda table: table.update({STATE: {"bytes": entry.bytes, "sha256": entry.sha256}}))


def rewrite(save: Path, values: Any) -> None:
    write_state(save, json.dumps(values))


@pytest.mark.parametrize("name", CHANGES)
def test_a_save_that_is_none(directory: StateDirectory, name: str) -> None:
    CHANGES[name](directory.path / SECOND)
    step, (line,) = resumed(directory)
    assert step == 3 and SECOND in line


def test_no_whole_save(directory: StateDirectory) -> None:
    for name in (FIRST, SECOND):
        (directory.path / name / MODEL).write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{SECOND}.*is truncated.*{FIRST}.*is truncated.*--overwrite"):
        directory.latest()


def test_after_damage_the_next_saves_are_whole(directory: StateDirectory) -> None:
    """Step 6 comes again; the save that the run went on from stays until there are two newer ones."""
    (directory.path / SECOND / MODEL).write_bytes(b"")
    assert resumed(directory)[0] == 3
    directory.save(6, state(6))
    assert resumed(StateDirectory(directory.path)) == (6, [])
    assert sorted(path.name for path in directory.path.glob("state-*")) == [FIRST, SECOND]
    directory.save(9, state(9))
    assert sorted(path.name for path in directory.path.glob("state-*")) == [SECOND, "state-00000009"]


def test_further_files_of_a_save_are_checked(directory: StateDirectory) -> None:
    """Whatever a save holds is listed, a file of another process among them."""
    save = directory.path / SECOND
    (save / "rank-1.safetensors").write_bytes(b"1")
    entry = FileEntry.of(save / "rank-1.safetensors")
    edit(save / FILES, lambda table: table.update({"rank-1.safetensors": {"bytes": 1, "sha256": entry.sha256}}))
    assert read_save(save, 6).values["step"] == 6
    (save / "rank-1.safetensors").write_bytes(b"2")
    with pytest.raises(CheckpointError, match=r"rank-1.safetensors was changed"):
        read_save(save, 6)


def test_possible_values() -> None:
    check_values(VALUES, 6)
    check_values({**VALUES, "step": 0, "evaluations": {}, "last": {}}, 6)
    load = {"max_over_mean": [1.0, None], "entropy": [0.5, 0.5]}
    check_values({**VALUES, "last": {**VALUES["last"], "router": {"clean": load, "noisy": load}}}, 6)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 7}, {"step": -1}, {"step": True}, {"step": 6.0}, {"step": None},
        {"totals": {}}, {"totals": {"clean_tokens": -1, "noisy_tokens": 0}}, {"totals": []},
        {"totals": {"clean_tokens": 10**400, "noisy_tokens": 0}},
        {"evaluations": {"7": EVALUATION}}, {"evaluations": {"x": EVALUATION}}, {"evaluations": {"0": {}}},
        {"evaluations": {"0": {**EVALUATION, "ar_loss": "low"}}}, {"evaluations": [1]}, {"evaluations": None},
        {"evaluations": {"0": {**EVALUATION, "one_minus_tv": 1}}}, {"evaluations": {"9" * 5000: EVALUATION}},
        {"last": {}}, {"last": None}, {"last": {"ar_loss": None, "diffusion_loss": 1.0}},
        {"last": {**VALUES["last"], "router": {"clean": 3}}},
    ],
)
def test_impossible_values(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="this run cannot have; start again with --overwrite"):
        check_values({**VALUES, **change}, 6)


def test_tensors_of_another_model() -> None:
    masters, good = state(6).model, state(6)
    check_tensors(good, masters)
    check_tensors(SavedState(good.model, {}, {}), masters)
    moments = good.optimizer
    wrong = [
        ({"w": good.model["w"].double()}, moments), ({"w": good.model["w"][:3]}, moments), ({}, moments),
        (good.model, {**moments, "w.exp_avg": moments["w.exp_avg"][:3]}), 
        (good.model, {**moments, "v.step": moments["w.step"]}),
        (good.model, {**moments, "w.step": moments["w.exp_avg"]}), (good.model, {"w.step": moments["w.step"]}),
        (good.model, {**moments, "w.more": moments["w.step"]}), (good.model, {"": moments["w.step"]}),
    ]
    for model, optimizer in wrong:
        with pytest.raises(CheckpointError, match="belongs to another model"):
            check_tensors(SavedState(model, optimizer, {}), masters)


# --- crash points


def fresh(path: Path) -> StateDirectory:
    made = StateDirectory(path)
    made.create({"seed": 0})
    made.save(3, state(3))
    return made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_a_kill_between_any_two_calls_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """From the making of the folder to its removal: what is left resumes at a save that is whole, or begins anew."""
    work = tmp_path / "work"
    path = work / "out.partial"
    work.mkdir()
    steps: list[int] = [0]

    def snapshot(number: int) -> None:
        shutil.copytree(work, tmp_path / f"killed-{number}")
        possible[number] = {steps[-1], *steps[-2:]}

    possible: dict[int, set[int]] = {}
    with monkeypatch.context() as patch, Watch(patch, snapshot, (saves, "save_file")) as watch:
        made = StateDirectory(path)
        made.create({"seed": 0})
        for step in (3, 6, 9):
            steps.append(step)
            made.save(step, state(step))
        removing = watch.count
        made.remove()
    assert list(work.iterdir()) == [] and watch.count > 50
    for number in range(watch.count):
        left = StateDirectory(tmp_path / f"killed-{number}" / "out.partial")
        lines: list[str] = []
        if left.in_use and number < removing:
            left.check_identity({"seed": 0})
            found = left.latest(lines.append)
            assert (found.values["step"] if found is not None else 0) in possible[number]
            assert lines == [], "nothing is damaged"
        else:  # the checkpoint is in its place: nobody resumes any more
            left.create({"seed": 0})
        left.save(12, state(12))
        assert resumed(StateDirectory(left.path)) == (12, [])
        left.remove()
        assert not left.path.exists()


@pytest.mark.parametrize(("code", "lasting"), FAILURES)
def test_an_error_at_any_call_of_a_save(
    code: int, lasting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """One sentence; the save before stays, and the same run, or the next one, saves as if nothing had been."""
    for number, watch in enumerate(failing(monkeypatch, code, lasting, (saves, "save_file"))):
        made = fresh(tmp_path / f"{number}.partial")
        try:
            with watch:
                made.save(6, state(6))
        except TrainingError as error:
            assert str(error).startswith("cannot write ") and os.strerror(code) in str(error)
            assert resumed(StateDirectory(made.path))[0] in (3, 6)
        else:
            assert resumed(StateDirectory(made.path)) == (6, [])
        again = made if number % 2 else StateDirectory(made.path)
        if again is not made:
            again.latest()
        again.save(9, state(9))
        assert resumed(StateDirectory(made.path)) == (9, [])
        left = {path.name for path in made.path.iterdir()} - {"latest", "run.json", "state-00000009"}
        assert left in ({FIRST}, {SECOND})


@pytest.mark.parametrize(("code", "lasting"), FAILURES)
def test_an_error_at_any_call_of_a_beginning(
    code: int, lasting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """A folder that cannot be made is none, and in nobody's way."""
    for number, watch in enumerate(failing(monkeypatch, code, lasting)):
        made = StateDirectory(tmp_path / f"{number}.partial")
        with contextlib.suppress(TrainingError, UsageError), watch:
            made.create({"seed": 0})
        if not made.in_use:
            made.create({"seed": 0})
        made.check_identity({"seed": 0})
        made.save(3, state(3))
        assert resumed(StateDirectory(made.path)) == (3, [])


def test_what_is_absent_is_said_to_be_not_set() -> None:
    old, new = {"a": {"kept": None, "gone": True, "same": 1}}, {"a": {"same": 1, "given": 0.1}}
    assert differences(old, new) == ["a.given was not set and is now 0.1", "a.gone was true and is now not set"]
