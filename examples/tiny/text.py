"""Real text from the running Python's standard library: docstrings and source of its pure-Python modules.

Licence: these documents are part of Python, copyright Python Software Foundation, used under the PSF License Agreement
(PSF-2.0); they are not covered by this project's Apache-2.0 licence.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"antigravity", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "this", "turtledemo"}
MIN_CHARS, MAX_CHARS = 120, 1200


def sources() -> list[Path]:
    """The library's own .py files in a fixed order, tests and data tables left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        name = parts[0].removesuffix(".py")
        if name in sys.stdlib_module_names and name not in SKIPPED and not {"test", "tests"} & set(parts):
            found.append(path)
    return sorted(found)


def pieces(path: Path) -> Iterator[str]:
    """The docstring of a module, then the source of each function, method and small class."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return
    module_doc = ast.get_docstring(tree)
    if module_doc:
        yield module_doc
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.end_lineno:
            block = lines[node.lineno - 1 : node.end_lineno]
            yield "\n".join(line[node.col_offset :] if line[: node.col_offset].isspace() else line for line in block)


def documents() -> list[str]:
    """All documents, shortened at a line end to MAX_CHARS, ASCII only, without repeats, in a fixed shuffled order."""
    seen: dict[str, None] = {}
    for path in sources():
        for piece in pieces(path):
            text = piece.strip()
            if len(text) > MAX_CHARS:
                text = text[:MAX_CHARS].rpartition("\n")[0]
            if len(text) >= MIN_CHARS and text.isascii():
                seen[text] = None
    result = list(seen)
    random.Random("stdlib").shuffle(result)
    return result


def is_held_out(text: str) -> bool:
    """Whether a document (one in 32 by its hash) is kept for measuring the loss."""
    return hashlib.sha256(text.encode()).digest()[0] % 32 == 0
