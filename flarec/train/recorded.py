"""The arguments of a run in its record, so that `flarec finish OUT.partial` needs nothing else."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoint.location import PARTIAL
from ..errors import UsageError
from ..recipe.files import recipe_files
from .arguments import Arguments
from .data.sources import parse_source
from .options import Options
from .state import StateDirectory

_OF_A_CALL = {
    "out", "resume", "overwrite", "stop_after", "push_to_hub", "debug", "prompts", "chat", "samples", "temperature",
    "answer_tokens",
}
"""Arguments that say nothing about the run, or whose result is among the data already."""


def arguments_of(options: Options) -> dict[str, Any]:
    """Plain values; every file by its whole path, so that they hold in other directories too."""

    def place(text: str) -> str:
        return os.path.abspath(text) if os.path.exists(text) else text

    def data(texts: tuple[str, ...]) -> list[str]:
        return [f"{os.path.abspath(spec.path)}:{spec.weight!r}" for spec in map(parse_source, texts)]

    recipe = place(options.recipe) if recipe_files(options.recipe) else options.recipe
    values = {item.name: getattr(options, item.name) for item in fields(Arguments) if item.name not in _OF_A_CALL}
    values |= {"source": place(options.source), "data": data(options.data), "eval_data": data(options.eval_data)}
    values["merge_adapter"] = place(options.merge_adapter) if options.merge_adapter is not None else None
    values["gguf"] = place(options.gguf) if options.gguf is not None else None
    values |= {"recipe": recipe, "plugins": [place(text) for text in options.plugins]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def recorded_options(partial: Path, *, overwrite: bool = False) -> Options:
    """The arguments of the run in OUT.partial, to go on with it. Raises `UsageError` if they are not there."""
    directory = StateDirectory(partial)
    if partial.name == PARTIAL or not partial.name.endswith(PARTIAL):
        raise UsageError(f"{partial} is not called OUT{PARTIAL}; give the directory that holds a run's training state")
    if not directory.in_use:
        raise UsageError(f"{partial} holds no run; give the directory that holds a run's training state")
    directory.check_own(whole=False)
    values = directory.arguments
    if not values:
        raise UsageError(
            f"{partial} was begun by a version of flarec that did not keep the arguments; give them again: "
            "flarec convert ... --resume --steps N, where N is the step that is saved"
        )
    out = partial.with_name(partial.name.removesuffix(PARTIAL))
    known = {item.name for item in fields(Arguments)} - _OF_A_CALL
    if not values.keys() <= known:
        raise UsageError(f"{partial} was begun by a newer version of flarec; upgrade flarec to finish it")
    if not directory.saved_step:
        raise UsageError(f"{partial} has no trained step that is saved; there is nothing to write yet")
    return Options(**{**values, "out": out, "resume": True, "overwrite": overwrite})
