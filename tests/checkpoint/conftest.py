"""A checkpoint that the tests of this folder share, and one that a test may damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import converted


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, checkpoint) that no test changes."""
    return converted(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def copy(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    for path in pair[1].rglob("*"):
        if path.is_file():
            target = tmp_path / "copy" / path.relative_to(pair[1])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "copy"
