"""Files that commands write: an input is never one of them, and a failure leaves what was there."""

from __future__ import annotations

import ast
import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from flarec.base.files import check_apart, flush, flush_tree, replace_file, unused, write_file
from flarec.errors import UsageError
from tests.checkpoints import tree
from tests.cli.conversions import flarec
from tests.models import tiny_checkpoint
from tests.test_repository import PACKAGE_FILES, ROOT


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bamba"}')
    (tmp_path / "results.json").write_text('{"rows": []}')
    return tmp_path


def test_apart(place: Path) -> None:
    """Neighbours, common parents, names that only begin alike, and what does not exist."""
    (place / "mod").mkdir()
    for output in ("out", "mod", "model2", "model.partial", "mod/model", "elsewhere/../out"):
        check_apart([Path(output)], [Path("model"), Path("results.json"), Path("owner/name"), Path("flare")])


@pytest.mark.parametrize("output", ["model", "model/x", "./model/", "x/../model", "here/model", "here/model/x/y", "."])
def test_not_apart(place: Path, output: str) -> None:
    (place / "here").symlink_to(".")
    with pytest.raises(UsageError, match="choose another --out"):
        check_apart([Path("out"), Path(output)], [Path("results.json"), Path("model")])


def test_one_folder_under_two_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bind mount, or a file system that ignores case: no path says so, device and inode do."""
    real = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        return real(str(path).replace("MODEL", "model"), **options)

    monkeypatch.setattr(os, "stat", stat)
    for output in ("MODEL", "MODEL/out"):
        with pytest.raises(UsageError, match="choose another"):
            check_apart([Path(output)], [Path("model")])


def test_links_that_lead_in_circles(place: Path) -> None:
    (place / "loop").symlink_to("loop")
    (place / "model" / "self").symlink_to(".")
    check_apart([Path("loop"), Path("out")], [Path("model"), Path("loop")])


COMMANDS = {
    "the source's own file": ["inspect", "model", "--out", "model/config.json"],
    "a new file in the source": ["inspect", "model", "--out", "model/program.txt"],
    "the source's file through a link": ["inspect", "model", "--out", "linked.json"],
    "the results": ["bench", "plot", "results.json", "--out", "results.json"],
    "the results through a link": ["bench", "plot", "results.json", "--out", "linked.svg"],
    "another file": ["families", "bamba", "--run", "--write", "notes.json"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_writes_over_its_input(place: Path, name: str) -> None:
    (place / "linked.json").symlink_to("model/config.json")
    (place / "linked.svg").symlink_to("results.json")
    (place / "notes.json").write_text('{"mine": true}')
    before = tree(place)
    result = flarec(*COMMANDS[name])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert "choose another --out" in line or "name another file" in line
    assert tree(place) == before


def test_inspect_writes_where_nothing_is_lost(place: Path) -> None:
    source = tiny_checkpoint(place, "qwen3_5_text")
    (place / "program.txt").write_text("the old one")
    (place / "linked.txt").symlink_to("program.txt")
    assert flarec("inspect", source, "--after", "capture", "--out", "linked.txt").exit_code == 0
    assert "softmax" in (place / "program.txt").read_text()
    assert (place / "linked.txt").is_symlink()
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("step", ["pathlib.Path.write_bytes", "os.fsync", "os.replace"])
def test_a_failure_leaves_the_old_file(place: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, full)
    before = tree(place)
    with pytest.raises(UsageError, match=r"results.json cannot be written: No space left .*choose another --out"):
        write_file(Path("results.json"), "new")
    assert tree(place) == before


def test_files_keep_their_mode_and_new_ones_have_the_usual_one(place: Path) -> None:
    before = os.umask(0o027)
    try:
        (place / "results.json").chmod(0o604)
        write_file(Path("results.json"), "new")
        write_file(Path("other.json"), "new")
    finally:
        os.umask(before)
    assert [(place / name).stat().st_mode & 0o777 for name in ("results.json", "other.json")] == [0o604, 0o640]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What reaches the disk and what gets its name, in order: ("sync" or "name", path)."""
    found: list[tuple[str, str]] = []
    sync, give = os.fsync, os.replace

    def fsync(handle: int) -> None:
        found.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    def replace(old: Path, new: Path) -> None:
        found.append(("name", str(new)))
        give(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return found


def test_contents_are_on_the_disk_before_the_name_is(place: Path, calls: list[tuple[str, str]]) -> None:
    """Else a power cut could leave the name with nothing in it."""
    path, part = place.resolve() / "results.json", place.resolve() / "part"
    replace_file(path, "ä", part)
    assert calls == [("sync", str(part)), ("name", str(path)), ("sync", str(path.parent))]
    assert path.read_bytes() == "ä".encode()
    assert not part.exists()


def test_a_tree_reaches_the_disk_from_its_files_on(place: Path, calls: list[tuple[str, str]]) -> None:
    (place / "model" / "sub").mkdir()
    (place / "model" / "sub" / "weights").write_text("1")
    root = place.resolve() / "model"
    flush_tree(root)
    assert {Path(path).relative_to(root).as_posix() for _, path in calls} == {"config.json", "sub", "sub/weights", "."}
    assert calls[-1] == ("sync", str(root))


@pytest.mark.parametrize(("code", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_synced(place: Path, code: int, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.nullcontext() if passes else pytest.raises(OSError, match="Input/output"):
        flush(place)
    with pytest.raises(OSError):
        flush(place / "results.json")


def test_what_is_no_file_is_written_as_it_is(place: Path) -> None:
    write_file(Path("/dev/null"), json.dumps({}))
    assert not Path("/dev/null").is_file()


def test_unused_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / ".out.writing-aa").symlink_to("nowhere")
    tokens = iter(["aa", "bb"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tokens))
    assert unused(Path("out"), "writing") == Path(".out.writing-bb")


MAY_REMOVE = {
    "flarec/base/files.py": "its own temporary file, under a name that nothing had",
    "flarec/train/state.py": "what a run wrote, in a folder with a run's record",
    "flarec/checkpoint/place.py": "folders that the lock names, and a checkpoint that `check_destination` knows",
    "flarec/checkpoint/write.py": "a folder in the one that it made",
    "flarec/checkpoint/retune.py": "what a kill left of its own temporary files, by name, in a checkpoint",
    "flarec/base/lock.py": "a lock that this process holds",
    "flarec/train/answers/log.py": "the answers of an earlier run, whose record has their hash",
    "flarec/train/trackers/services.py": "event files of TensorBoard in the folder of a run's own that it writes",
    "flarec/frontend/cache.py": "files of the program cache, by name and first line",
}
"""Modules that remove, replace or rename something, and what."""
REMOVING = {"rmtree", "unlink", "rmdir", "remove_dirs", "removedirs", "rename", "renames"}
OF_OS, OF_SHUTIL = {"remove", "replace", "truncate"}, {"move"}


def removals(source: str) -> list[int]:
    """Lines that call something that removes or replaces files."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            methods = REMOVING | {"os": OF_OS, "shutil": OF_SHUTIL}.get(owner, set())
            if node.func.attr in methods:
                found.append(node.lineno)
    return found


def test_few_places_remove_anything() -> None:
    found = {str(path.relative_to(ROOT)) for path in PACKAGE_FILES if removals(path.read_text())}
    assert found == set(MAY_REMOVE)
    text = "import os, shutil\nshutil.rmtree(x)\nPath(x).unlink()\nos.replace(a, b)\nshutil.move(a, b)\nslot.move(a)"
    assert removals(text) == [2, 3, 4, 5]
