"""Writing a checkpoint is all or nothing, whatever fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from flarec.checkpoint import write as module
from flarec.checkpoint.directory import open_checkpoint
from flarec.checkpoint.manifest import Manifest
from flarec.checkpoint.write import check_destination, write_checkpoint
from flarec.errors import CheckpointError
from tests.checkpoints import manifest_for, mask_vector
from tests.models import tiny_checkpoint, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return manifest_for(tiny_checkpoint(tmp_path_factory.mktemp("source"), "bamba"))


@pytest.fixture
def parts(manifest: Manifest) -> dict[str, Any]:
    """Arguments of `write_checkpoint`, but for the destination."""
    return {"model": tiny_model("bamba"), "tokenizer": tiny_tokenizer(), "manifest": manifest}


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
        monkeypatch.setattr(module, "save_file", failure)
        parts["extra"] = mask_vector()
    elif step == "card":
        monkeypatch.setattr(module, "model_card", failure)
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
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("old")
    break_at(step, monkeypatch, parts, full)
    with pytest.raises(CheckpointError):
        write_checkpoint(tmp_path / "out", **parts, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


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
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("old")
    real = os.rename

    def rename(old: Any, new: Any) -> None:
        if ".writing-" in str(old):
            raise OSError(errno.EACCES, "refused")
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CheckpointError, match=r"cannot be written .*refused"):
        write_checkpoint(tmp_path / "out", **parts, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_own_mistakes_are_not_dressed_up(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*args: Any) -> None:
        raise TypeError("a bug")

    break_at("card", monkeypatch, parts, mistake)
    with pytest.raises(TypeError, match="a bug"):
        write_checkpoint(tmp_path / "out", **parts)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_the_way(parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("old")
    with pytest.raises(CheckpointError, match=r"is not empty; .*--overwrite"):
        write_checkpoint(tmp_path / "out", **parts)
    assert (tmp_path / "out" / "precious").read_text() == "old"
    write_checkpoint(tmp_path / "out", **parts, overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()
    assert open_checkpoint(tmp_path / "out").manifest is not None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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
