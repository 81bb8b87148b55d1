"""One row of the table of model families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One row of the table.

    functions: hooks by the name of the function or class in the modelling file that they replace; methods: hooks by
    "Class.method". A name in another module is written "package.module:name". mixerless: values of the configuration's
    list of layer types that stand for layers without a token mixer.
    """

    model_type: str
    mixers: tuple[str, ...]
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    architecture: str | None = None
    """Class that opens the converted checkpoint without remote code, where the configuration does not name it."""
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    mixerless: frozenset[str] = frozenset()
    positions: bool = True
    """Whether the model takes `position_ids`; a purely recurrent one has no use for them."""
