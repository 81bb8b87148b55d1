"""The built-in recipes: data, not code paths. Their meaning is in docs/semantics.md section 3."""

from __future__ import annotations

from importlib.resources import files

NAMES = ("flare", "draft", "dual", "adapter", "adapter-dual", "fluid")


def read(name: str) -> str:
    """The TOML text of a built-in recipe; `name` is one of `NAMES`."""
    return files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
