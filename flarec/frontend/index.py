"""A layer's index that notes whether somebody reads it: layers that do are not the same for being alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

READS = (
    "eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "int", "index", "float", "complex", "repr", "str", "format",
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod",
    "divmod", "rdivmod", "pow", "rpow", "neg", "pos", "abs", "invert", "round", "trunc", "floor", "ceil",
    "and", "rand", "or", "ror", "xor", "rxor", "lshift", "rlshift", "rshift", "rrshift",
)
"""What Python asks a number for."""


class Index:
    """Stands for an int; `read` once anything asks for its value, or whether it is an int."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.read = False

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        self.read = True
        return int

    def __getattr__(self, name: str) -> Any:
        self.read = True
        return getattr(self.value, name)


def _reading(name: str) -> Callable[..., Any]:
    def method(self: Index, *args: Any) -> Any:
        self.read = True
        return getattr(self.value, name)(*args)

    return method


for _name in READS:
    setattr(Index, f"__{_name}__", _reading(f"__{_name}__"))
