"""What a file was when it was written: size and hash, so that damage is noticed when it is read again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written."""

    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> FileEntry:
        return FileEntry(path.stat().st_size, sha256_of(path))

    def difference(self, path: Path, *, hashed: bool = True) -> str:
        """How the file at `path` differs from what was written, in words; empty if it does not. Raises `OSError`.

        hashed: whether the contents are read too, not only the size.
        """
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != self.bytes:
            what = "truncated" if size < self.bytes else "changed"
            return f"is {what}: it has {size:,} bytes, {self.bytes:,} were written"
        if hashed and sha256_of(path) != self.sha256:
            return "was changed after it was written (its hash differs)"
        return ""


def sha256_of(*paths: Path) -> str:
    """Hash of the contents of the files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
