"""`flarec convert --overwrite` costs nobody a file: no input is written or removed, and no folder that is not flarec's.

Each case is refused before the source is opened, so a source here is a directory with a config.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flarec as package
from flarec.errors import UsageError
from flarec.train.state import StateDirectory
from tests.checkpoints import own_folder, tree
from tests.cli.conversions import flarec

RECORD = "out.partial/run.json"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: model/, data.jsonl, a folder of data set/, recipe.toml, elsewhere/ with a user's file."""
    place = tmp_path / "place"
    for name in ("model/config.json", "model/model.safetensors", "set/data.arrow", "elsewhere/thesis.txt"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("{}")
    (place / "data.jsonl").write_text('{"text": "red"}\n')
    (place / "recipe.toml").write_text('base = "flare"\n')
    monkeypatch.chdir(place)
    return place


def move(old: str, new: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        (place / new).parent.mkdir(exist_ok=True)
        shutil.move(place / old, place / new)

    return change


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(place / target)

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)

    return change


def run(place: Path) -> None:
    """A run that was interrupted after its first save."""
    StateDirectory(place / "out.partial").create({"seed": 0})
    write("out.partial/latest", "state-00000001")(place)
    write("out.partial/state-00000001/state.json", "{}")(place)


def checkpoint(place: Path) -> None:
    own_folder(place / "out", "precious")


def both(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        for part in changes:
            part(place)

    return change


def nothing(place: Path) -> None:
    pass


IN_OUT, IN_PARTIAL = "lies in the output directory out,", "lies in the output directory out.partial,"
NOT_OURS = "out.partial has no record of a run of flarec"
CASES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    # OUT.partial holds an input
    "source is OUT.partial": (move("model", "out.partial"), {"source": "out.partial"}, f"out.partial {IN_PARTIAL}"),
    "source in OUT.partial": (
        move("model", "out.partial/model"), {"source": "out.partial/model"}, f"out.partial/model {IN_PARTIAL}"),
    "data in OUT.partial": (
        move("data.jsonl", "out.partial/data.jsonl"), {"data": "out.partial/data.jsonl"}, IN_PARTIAL),
    "data in a run's OUT.partial": (
        both(run, move("data.jsonl", "out.partial/metrics.jsonl")), {"data": "out.partial/metrics.jsonl"}, IN_PARTIAL),
    "folder of data is OUT.partial": (move("set", "out.partial"), {"data": "out.partial"}, IN_PARTIAL),
    "weighted data in OUT.partial": (
        move("data.jsonl", "out.partial/d.jsonl"), {"data": "out.partial/d.jsonl:2"}, IN_PARTIAL),
    "evaluation data in OUT.partial": (
        move("data.jsonl", "out.partial/d.jsonl"), {"data": "set", "eval_data": "out.partial/d.jsonl"}, IN_PARTIAL),
    "recipe in OUT.partial": (
        move("recipe.toml", "out.partial/r.toml"), {"recipe": "out.partial/r.toml"}, f"r.toml {IN_PARTIAL}"),
    "base of the recipe in OUT.partial": (
        both(write("out.partial/base.toml", 'base = "flare"'), write("recipe.toml", 'base = "out.partial/base.toml"')),
        {"recipe": "recipe.toml"}, f"base.toml {IN_PARTIAL}"),
    # OUT.partial is not a run's
    "a user's OUT.partial": (move("elsewhere", "out.partial"), {}, NOT_OURS),
    "another program's run.json": (write(RECORD, '{"name": "experiment"}'), {}, NOT_OURS),
    "run.json with the keys of a recipe": (write(RECORD, '{"recipe": {}, "seed": 0}'), {}, NOT_OURS),
    "run.json is a list": (write(RECORD, "[]"), {}, NOT_OURS),
    "run.json is no JSON": (write(RECORD, "{"), {}, NOT_OURS),
    "run.json of a newer version": (
        write(RECORD, '{"record": "flarec conversion run", "format_version": 1000, "identity": {}}'), {}, NOT_OURS),
    "run.json without an identity": (
        write(RECORD, '{"record": "flarec conversion run", "format_version": 1}'), {}, NOT_OURS),
    "run.json is a link": (
        both(run, move(RECORD, "run.json"), link(RECORD, "run.json")), {}, NOT_OURS),
    "a user's file in a run": (
        both(run, write("out.partial/notes.txt", "mine")), {}, "holds notes.txt, which no run of flarec wrote"),
    "a user's folder in a run": (
        both(run, write("out.partial/state-of-the-art/x", "mine")), {}, "holds state-of-the-art, which no run"),
    "a link in a run": (
        both(run, link("out.partial/state-00000002", "elsewhere")), {}, "holds state-00000002, which no run"),
    "OUT.partial is a link to a run": (
        both(run, move("out.partial", "elsewhere/run"), link("out.partial", "elsewhere/run")), {}, "is a link"),
    "OUT.partial is a link to a user's folder": (link("out.partial", "elsewhere"), {}, "out.partial is a link"),
    "OUT.partial is a link to nothing": (link("out.partial", "nowhere"), {}, "out.partial is a link"),
    "OUT.partial is a link to the source": (link("out.partial", "model"), {}, f"model {IN_PARTIAL}"),
    "OUT.partial is a file": (write("out.partial", "mine"), {}, "out.partial is not a directory"),
    # OUT is, holds or lies in an input
    "OUT is the source": (nothing, {"out": "model"}, "model lies in the output directory model,"),
    "OUT is the source, with slashes": (nothing, {"out": ".//model///"}, "lies in the output directory model,"),
    "OUT is the source, by a detour": (nothing, {"out": "out/../model"}, "lies in the output directory out/../model,"),
    "OUT is the source, by a folder": (nothing, {"out": "set/../model"}, "lies in the output directory set/../model,"),
    "OUT is a link to the source": (link("out", "model"), {}, f"model {IN_OUT}"),
    "the source is a link to OUT": (
        both(checkpoint, write("out/config.json", "{}"), link("linked", "out")), {"source": "linked"},
        "linked is a converted checkpoint already"),
    "OUT through a link to the source's folder": (
        link("linked", "."), {"out": "linked/model"}, "lies in the output directory linked/model,"),
    "OUT in the source": (nothing, {"out": "model/out"}, "model/out lies in model, which is read"),
    "OUT deep in the source": (nothing, {"out": "model/a/b"}, "model/a/b lies in model, which is read"),
    "OUT in a folder of data": (nothing, {"data": "set", "out": "set/out"}, "set/out lies in set, which is read"),
    "the source in OUT": (
        both(checkpoint, move("model", "out/model")), {"source": "out/model"}, f"out/model {IN_OUT}"),
    "data in OUT": (both(checkpoint, move("data.jsonl", "out/d.jsonl")), {"data": "out/d.jsonl"}, IN_OUT),
    "data are a file of the old checkpoint": (
        both(checkpoint, move("data.jsonl", "out/precious"), link("data.jsonl", "out/precious")), {}, IN_OUT),
    "weights are linked from OUT": (
        both(checkpoint, link("model/model.safetensors", "out/precious")), {}, f"model/model.safetensors {IN_OUT}"),
    "a part of the data is linked from OUT": (
        both(checkpoint, link("set/sub.arrow", "out")), {"data": "set"}, f"set/sub.arrow {IN_OUT}"),
    "OUT is here": (nothing, {"out": "."}, "model lies in the output directory"),
    "OUT is above": (nothing, {"out": ".."}, "model lies in the output directory"),
    "OUT is here, by a detour": (nothing, {"out": "model/.."}, "model lies in the output directory"),
    # OUT is not a checkpoint
    "a user's OUT": (nothing, {"out": "elsewhere"}, "elsewhere is not replaced by --overwrite: it is no checkpoint"),
    "a user's file in OUT": (
        both(checkpoint, write("out/notes.txt", "mine")), {}, "notes.txt in it was not written by flarec"),
    "another program's flarec.json": (write("out/flarec.json", "{}"), {}, "is not a manifest of flarec"),
    "OUT is a file": (write("out", "mine"), {}, "out exists and is not a directory"),
    "OUT is a link": (link("out", "elsewhere"), {}, "out exists and is not a directory"),
}


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    return {"source": "model", "data": "data.jsonl", "out": "out", **values}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_removed(place: Path, name: str) -> None:
    """By the command line and by the Python interface: one sentence, and every file as it was."""
    change, given, expected = CASES[name]
    change(place)
    values, before = arguments(given), tree(place.parent)
    source, data = values.pop("source"), values.pop("data")
    options = [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", value)]
    result = flarec("convert", source, "--data", data, *options, "--overwrite")
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert expected in line
    assert tree(place.parent) == before
    with pytest.raises(UsageError) as caught:
        package.convert(source, data, **values, overwrite=True)
    assert f"Error: {caught.value}" == line
    assert tree(place.parent) == before


@pytest.mark.parametrize("change", [link("out.partial", "elsewhere"), write(RECORD, "[]"), write("out.partial", "")])
def test_only_a_run_is_resumed(place: Path, change: Callable[[Path], None]) -> None:
    change(place)
    before = tree(place)
    result = flarec("convert", "model", "--data", "data.jsonl", "--out", "out", "--resume")
    assert result.exit_code == 2
    assert "nothing is removed: move it away or choose another --out" in result.stderr
    assert tree(place) == before


def test_a_dry_run_says_the_same(place: Path) -> None:
    run(place)
    write("out.partial/notes.txt", "mine")(place)
    before = tree(place)
    result = flarec("convert", "model", "--data", "data.jsonl", "--out", "out", "--overwrite", "--dry-run")
    assert (result.exit_code, "holds notes.txt" in result.stderr) == (2, True)
    assert tree(place) == before


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--overwrite",)])
def test_nothing_is_written_into_another_checkpoint(place: Path, more: tuple[str, ...]) -> None:
    write("other/flarec.json", "{}")(place)
    before = tree(place)
    result = flarec("convert", "model", "--data", "data.jsonl", "--out", "other/inner/out", *more)
    assert result.exit_code == 2 and "lies in the checkpoint" in result.stderr.splitlines()[-1]
    assert tree(place) == before


def test_an_old_record_is_a_record(place: Path) -> None:
    """From before records had a name: a run can be resumed, and started again."""
    identity = {"recipe": {"name": "flare"}, "seed": 0, "kernels": "torch", "source": {"name": "m"}, "data": {}}
    write(RECORD, json.dumps(identity))(place)
    directory = StateDirectory(place / "out.partial")
    directory.check_identity(identity)
    directory.create({})
    assert [path.name for path in directory.path.iterdir()] == ["run.json"]


def test_what_a_run_did_not_write_outlives_it(place: Path) -> None:
    """Something may be put into the folder after the last check."""
    run(place)
    write("out.partial/notes.txt", "mine")(place)
    link("out.partial/state-00000007", "elsewhere")(place)
    StateDirectory(place / "out.partial").remove()
    kept = ["notes.txt", "state-00000007"]
    assert sorted(path.name for path in (place / "out.partial").iterdir()) == kept
    assert (place / "elsewhere" / "thesis.txt").exists()
    with pytest.raises(UsageError, match="has no record"):
        StateDirectory(place / "out.partial").create({})


def test_a_save_pointer_that_leads_elsewhere_is_not_followed(place: Path) -> None:
    run(place)
    write("out.partial/latest", "../elsewhere")(place)
    with pytest.raises(UsageError, match="latest names no save of a run"):
        StateDirectory(place / "out.partial").latest()


def test_a_run_that_cannot_begin_leaves_no_folder_in_the_way(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match="cannot write"):
        StateDirectory(place / "out.partial").create({})
    assert not (place / "out.partial").exists()
