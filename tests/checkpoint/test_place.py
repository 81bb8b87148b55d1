"""How a checkpoint gets its place: a kill between any two calls of the system loses and leaves nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flarec.base import files
from flarec.base.hashes import FileEntry
from flarec.base.lock import OutputLock, check_free, lock_path
from flarec.checkpoint import own, place
from flarec.checkpoint.manifest import DecodeDefaults, Manifest, MaskToken, Source
from flarec.checkpoint.own import check_destination
from flarec.checkpoint.place import Place, recover
from flarec.errors import CheckpointError
from tests.checkpoints import own_folder, tree
from tests.crashes import FAILURES, Watch, failing


def fill(folder: Path) -> None:
    """As `own_folder` does, in a folder that exists."""
    for name in ("weights", "sub/code"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"the new {name}")
    entries = {name: FileEntry.of(folder / name) for name in ("weights", "sub/code")}
    manifest = Manifest(Source("origin"), MaskToken("row", 1), DecodeDefaults(3, {}), files=entries)
    (folder / "flarec.json").write_text(manifest.to_json())


def write(out: Path) -> None:
    """As `write_checkpoint` does, without a model."""
    with OutputLock(out) as lock:
        recover(out, lock)
        made = Place(out, lock)
        try:
            made.make()
            fill(made.folder)
            made.take()
        finally:
            made.clear()


def nothing(out: Path) -> None:
    pass


def empty(out: Path) -> None:
    out.mkdir()


def old(out: Path) -> None:
    own_folder(out, "weights", "sub/deep")


PLACES: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "nothing there": (nothing, True),
    "an empty folder": (empty, True),
    "a checkpoint": (old, True),
    "a checkpoint, no exchange": (old, False),
}


@pytest.fixture(params=PLACES)
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    prepare, exchanges = PLACES[request.param]
    if not exchanges:
        monkeypatch.setattr(place, "exchange", lambda one, other: False)
    return prepare


def contents(folder: Path) -> str:
    """What stands at the place: nothing, the old or the new checkpoint, whole; anything else is an error."""
    if not folder.exists() or not any(folder.iterdir()):
        return "nothing"
    manifest = Manifest.read(folder)
    assert manifest is not None, tree(folder)
    manifest.check_files(folder)
    assert own.why_not_own(folder) == ""
    return "new" if "the new" in (folder / "weights").read_text() else "old"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on the disk itself."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_a_kill_between_any_two_calls(
    before: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is copied before every call: each copy is what a kill there leaves."""
    work = tmp_path / "work"
    work.mkdir()
    before(work / "out")
    first = contents(work / "out")

    with monkeypatch.context() as patch:
        watch = Watch(patch, lambda number: shutil.copytree(work, tmp_path / f"killed-{number}", symlinks=True),
                      (place, "exchange"))
        with watch:
            write(work / "out")
    assert contents(work / "out") == "new"
    assert [path.name for path in work.iterdir()] == ["out"]
    assert watch.count > 10

    seen = set()
    for number in range(watch.count):
        killed = tmp_path / f"killed-{number}"
        noted = check_free(killed / "out")
        with OutputLock(killed / "out") as lock:
            recover(killed / "out", lock)
        found = contents(killed / "out")
        assert found in (first, "new")
        seen.add((bool(noted), found))
        left = [path.name for path in killed.iterdir() if path.name != "out"]
        assert left == [], (number, noted)
        write(killed / "out")
        assert contents(killed / "out") == "new"
        assert [path.name for path in killed.iterdir()] == ["out"]
    assert {found for _, found in seen} == {first, "new"}
    assert {noted for noted, _ in seen} == {True, False}


def test_out_is_never_absent_where_the_system_exchanges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    old(out)
    probe = [own_folder(tmp_path / name, "x") for name in ("one", "two")]
    if not files.exchange(*probe):
        pytest.skip("this file system does not exchange")
    seen: set[str] = set()
    with Watch(monkeypatch, lambda number: seen.add(contents(out)), (place, "exchange")) as watch:
        write(out)
    assert watch.count > 10 and seen == {"old", "new"}


@pytest.mark.parametrize(("code", "lasting"), FAILURES)
def test_an_error_at_any_call(
    before: Callable[[Path], Any], code: int, lasting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, or from then on: the old one or the new one is there, whole, and the next run cleans up."""
    for number, watch in enumerate(failing(monkeypatch, code, lasting, (place, "exchange"))):
        work = tmp_path / f"work-{number}"
        work.mkdir()
        before(work / "out")
        first, possible = contents(work / "out"), ["new"]
        try:
            with watch:
                write(work / "out")
        except OSError as error:
            assert error.errno == code
            possible.append(first)
        with OutputLock(work / "out") as lock:
            recover(work / "out", lock)
        assert contents(work / "out") in possible
        assert [path.name for path in work.iterdir() if path.name != "out"] == []
        write(work / "out")
        assert contents(work / "out") == "new"


@pytest.fixture
def refuses_to_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`out` as a mount point: it cannot be renamed, and nothing can be renamed into or out of it."""
    out, rename = tmp_path / "out", os.rename

    def renames(old: Any, new: Any, **options: Any) -> None:
        paths = [Path(path) for path in (old, new)]
        if out in paths or (out in paths[0].parents) != (out in paths[1].parents):
            raise OSError(errno.EXDEV if out not in paths else errno.EBUSY, "mounted")
        rename(old, new, **options)

    monkeypatch.setattr(os, "rename", renames)
    monkeypatch.setattr(os, "replace", renames)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    return out


def test_a_mount_point(refuses_to_move: Path) -> None:
    out = refuses_to_move
    out.mkdir()
    check_destination(out, overwrite=False)
    write(out)
    assert contents(out) == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match=r"it is a mount point, .*empty it, or choose a directory in it"):
        check_destination(out, overwrite=True)


def test_mount_points_are_recognised(tmp_path: Path) -> None:
    assert files.is_mount(Path("/proc"))
    assert not files.is_mount(tmp_path)
    assert files._unescaped(rb"/a\040b\134c") == rb"/a b\c"


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="out cannot be written to; choose another"):
        check_destination(tmp_path / "out", overwrite=False)


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Path]:
    """A run was killed after its checkpoint had taken the place of the old one, and before that was removed."""
    out = tmp_path / "out"
    old(out)
    lock = OutputLock(out)
    lock.__enter__()
    made = Place(out, lock)
    made.make()
    fill(made.folder)
    made.take()
    text = lock_path(out).read_bytes()
    lock.note({})
    lock.__exit__(None, None, None)
    lock_path(out).write_bytes(text)
    yield out


def test_what_somebody_put_into_a_left_over_is_not_removed(killed: Path) -> None:
    (folder,) = [path for path in killed.parent.iterdir() if ".writing-" in path.name]
    (folder / "notes.txt").write_text("mine")
    before = tree(killed.parent)
    expected = r"notes\.txt in it was not written by flarec; move it away"
    with OutputLock(killed) as lock, pytest.raises(CheckpointError, match=expected):
        recover(killed, lock)
    after = tree(killed.parent)
    assert {name: value for name, value in after.items() if not name.endswith(".lock")} == {
        name: value for name, value in before.items() if not name.endswith(".lock")
    }


@pytest.mark.parametrize(
    "name", ["elsewhere", "../x", ".out.writing-x", ".other.writing-00000000", ".out.writing-../00000", 3, None, ["x"]]
)
def test_only_names_that_flarec_gives_are_removed(name: Any, tmp_path: Path) -> None:
    for folder in ("elsewhere", ".other.writing-00000000", ".out.writing-x"):
        (tmp_path / folder).mkdir()
    (tmp_path / ".out.writing-11111111").symlink_to("elsewhere")
    before = tree(tmp_path)
    for folder in (name, ".out.writing-11111111"):
        with OutputLock(tmp_path / "out") as lock:
            lock.note({"folder": folder, "old": folder, "inside": False, "complete": True})
            recover(tmp_path / "out", lock)
    assert tree(tmp_path) == before
