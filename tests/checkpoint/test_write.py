"""Writing a checkpoint is all or nothing, whatever fails."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from flarec.checkpoint import place, write
from flarec.checkpoint.card import model_card
from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.manifest import Manifest
from flarec.checkpoint.own import check_destination
from flarec.checkpoint.write import write_checkpoint
from flarec.errors import CheckpointError
from tests.checkpoints import manifest_for, mask_vector, own_folder, tree
from tests.models import tiny_checkpoint, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return manifest_for(tiny_checkpoint(tmp_path_factory.mktemp("source"), "bamba"))


@pytest.fixture
def parts(manifest: Manifest) -> dict[str, Any]:
    """Arguments of `write_checkpoint`, but for the destination."""
    return {"model": tiny_model("bamba"), "tokenizer": tiny_tokenizer(), "manifest": manifest}


@pytest.mark.parametrize("chat", [True, False])
def test_the_card_says_how_a_model_is_talked_to(parts: dict[str, Any], tmp_path: Path, chat: bool) -> None:
    if not chat:
        parts["tokenizer"].chat_template = None
    card = (write_checkpoint(tmp_path / "out", **parts) / "README.md").read_text()
    assert ('" --chat --mode ar-trust' in card) == (", chat=True).text" in card) == chat
    assert ('"Once upon a time" --mode' in card) != chat


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def break_at(step: str, monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any], failure: Any) -> None:
    """Make one step of writing fail, after the steps before it have written their files."""
    if step == "weights":
        monkeypatch.setattr(type(parts["model"]), "save_pretrained", failure)
    elif step == "tokenizer":
        monkeypatch.setattr(type(parts["tokenizer"]), "save_pretrained", failure)
    elif step == "extra":
        monkeypatch.setattr(write, "save_file", failure)
        parts["extra"] = mask_vector()
    elif step == "card":
        monkeypatch.setattr(write, "model_card", failure)
    elif step == "manifest":
        monkeypatch.setattr(Manifest, "to_json", failure)
    else:
        monkeypatch.setattr(os, "fsync", failure)


STEPS = ["weights", "tokenizer", "extra", "card", "manifest", "sync"]


@pytest.mark.parametrize("failure", [full, full_in_rust])
@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk_leaves_nothing_behind(
    step: str, failure: Any, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(step, monkeypatch, parts, failure)
    with pytest.raises(CheckpointError, match=r"the disk is full: .*free some space"):
        write_checkpoint(tmp_path / "out", **parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", STEPS)
def test_a_failure_keeps_what_was_there(
    step: str, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_folder(tmp_path / "out", "precious", "sub/deep")
    before = tree(tmp_path)
    break_at(step, monkeypatch, parts, full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write_checkpoint(tmp_path / "out", **parts, overwrite=True)
    assert tree(tmp_path) == before


def test_an_interrupt_leaves_nothing_behind(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    break_at("manifest", monkeypatch, parts, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", **parts)
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_brings_the_old_one_back(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_folder(tmp_path / "out", "precious")
    before = tree(tmp_path)
    real = os.rename

    def rename(old: Any, new: Any) -> None:
        if ".writing-" in str(old):
            raise OSError(errno.EACCES, "refused")
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(place, "exchange", lambda one, other: False)
    with pytest.raises(CheckpointError, match=r"cannot be written .*refused"):
        write_checkpoint(tmp_path / "out", **parts, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_checkpoint_is_replaced(
    exchanges: bool, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one step where the system can do it, else in two."""
    if not exchanges:
        monkeypatch.setattr(place, "exchange", lambda one, other: False)
    own_folder(tmp_path / "out", "precious")
    write_checkpoint(tmp_path / "out", **parts, overwrite=True)
    assert open_checkpoint(tmp_path / "out").manifest is not None
    assert not (tmp_path / "out" / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_own_mistakes_are_not_dressed_up(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*args: Any) -> None:
        raise TypeError("a bug")

    break_at("card", monkeypatch, parts, mistake)
    with pytest.raises(TypeError, match="a bug"):
        write_checkpoint(tmp_path / "out", **parts)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_in_the_way(parts: dict[str, Any], tmp_path: Path) -> None:
    out = own_folder(tmp_path / "out", "precious")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not empty; .*--overwrite"):
        write_checkpoint(out, **parts)
    assert tree(tmp_path) == before
    write_checkpoint(out, **parts, overwrite=True)
    assert not (out / "precious").exists()
    assert open_checkpoint(out).manifest is not None
    write_checkpoint(out, **parts, overwrite=True)  # over what was really written
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def remove_the_manifest(out: Path) -> None:
    (out / "flarec.json").unlink()


def name_only(out: Path) -> None:
    (out / "flarec.json").write_text("{}")


def link_the_manifest(out: Path) -> None:
    (out / "flarec.json").rename(out.parent / "elsewhere.json")
    (out / "flarec.json").symlink_to(out.parent / "elsewhere.json")


def newer(out: Path) -> None:
    (out / "flarec.json").write_text('{"format_version": 1000}')


def add_a_file(out: Path) -> None:
    (out / "sub" / "notes.txt").write_text("mine")


def add_a_folder(out: Path) -> None:
    (out / "notes").mkdir()


def add_a_link(out: Path) -> None:
    (out / "precious").unlink()
    (out / "precious").symlink_to(out.parent)


FOREIGN = {
    remove_the_manifest: "it is no checkpoint of flarec",
    name_only: "is not a manifest of flarec",
    link_the_manifest: "it is no checkpoint of flarec",
    newer: "made by a newer flarec",
    add_a_file: "sub/notes.txt in it was not written by flarec",
    add_a_folder: "notes in it was not written by flarec",
    add_a_link: "precious in it was not written by flarec",
}


@pytest.mark.parametrize("change", FOREIGN, ids=lambda change: change.__name__)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_only_a_checkpoint_is_never_replaced(change: Any, overwrite: bool, tmp_path: Path) -> None:
    out = own_folder(tmp_path / "out", "precious", "sub/deep")
    check_destination(out, overwrite=True)
    change(out)
    before = tree(tmp_path)
    expected = rf"is not replaced by --overwrite: .*{FOREIGN[change]}.*move it away" if overwrite else "is not empty"
    with pytest.raises(CheckpointError, match=expected) as caught:
        check_destination(out, overwrite)
    assert ("--overwrite" in str(caught.value)) == overwrite, "nothing is advised that would be refused"
    assert tree(tmp_path) == before


def test_a_folder_that_changes_while_a_checkpoint_is_written(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first check and the last step, which would remove it."""
    out = own_folder(tmp_path / "out")
    def meanwhile(*args: Any) -> str:
        (out / "notes.txt").write_text("mine")
        return model_card(*args)

    monkeypatch.setattr(write, "model_card", meanwhile)
    with pytest.raises(CheckpointError, match=r"notes.txt in it was not written by flarec"):
        write_checkpoint(out, **parts, overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["flarec.json", "notes.txt", "out"]


def test_names_beside_the_checkpoint_are_nobodys(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens to have the name of a temporary folder stays, also when writing fails."""
    names = [f".out.{purpose}-{token}" for purpose in ("writing", "replaced") for token in (os.getpid(), "00000000")]
    for name in names:
        (tmp_path / name).mkdir()
    tokens = iter(["lock", "00000000", "11111111", "00000000", "22222222"])
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(tokens))
    own_folder(tmp_path / "out")
    write_checkpoint(tmp_path / "out", **parts, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "out"])


def test_an_empty_directory_is_not_in_the_way(parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert open_checkpoint(write_checkpoint(tmp_path / "out", **parts)).manifest is not None


@pytest.mark.parametrize("kind", ["file", "link"])
def test_only_directories_are_replaced(kind: str, tmp_path: Path) -> None:
    if kind == "file":
        (tmp_path / "out").write_text("")
    else:
        (tmp_path / "out").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        check_destination(tmp_path / "out", overwrite=True)
