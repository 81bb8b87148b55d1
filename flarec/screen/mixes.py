"""Mixes of data, and the runs that are made of them: the short one that compares, and the conversion."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UsageError
from ..recipe import Recipe
from ..recipe.sections import Evaluation, Objective, Save
from ..train.data.files import SourceSpec, parse_source
from ..train.options import Options
from .arguments import ScreenArguments


@dataclass(frozen=True)
class Mix:
    """A name and its sources with their weights."""

    name: str
    specs: tuple[SourceSpec, ...]

    def texts(self) -> tuple[str, ...]:
        """As `--data` of `flarec convert` takes them."""
        return tuple(f"{spec.path}:{spec.weight:g}" for spec in self.specs)


def parsed_mixes(arguments: ScreenArguments) -> list[Mix]:
    """Raises `UsageError` for a text that is no mix, a name that comes twice, fewer than two; `DataError` for files."""
    mixes = [_mix(text) for text in arguments.mixes]
    names = [mix.name for mix in mixes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--mix {twice[0]}=... is given twice; give each mix a name of its own")
    if len(mixes) < 2:
        raise UsageError(f"{len(mixes)} mixes are given; give --mix NAME=PATH[:WEIGHT],... at least twice")
    return mixes


def conversion(arguments: ScreenArguments, mix: Mix) -> Options:
    """The conversion with a mix."""
    return Options(
        source=arguments.source, data=mix.texts(), recipe=arguments.recipe, out=arguments.convert,
        overrides=arguments.overrides, max_length=arguments.max_length, device=arguments.device, seed=arguments.seed,
        kernels=arguments.kernels, skip_bad_lines=arguments.skip_bad_lines, eval_data=arguments.eval_data,
    )


def proxy(arguments: ScreenArguments, files: list[Path], place: Path) -> Options:
    """One short run of plain fine-tuning over all files, with the recipe's rows and rate; nothing but its recipe is
    written, into the temporary folder `place`.

    The warmup is at most a tenth of the steps. A recipe for an adapter trains the model here.
    """
    whole = Options(
        arguments.source, recipe=arguments.recipe, overrides=arguments.overrides, seed=arguments.seed,
        max_length=arguments.max_length,
    )
    recipe, usual = whole.load_recipe(), Recipe()
    optimizer = recipe.optimizer
    lr = arguments.lr if arguments.lr is not None else usual.optimizer.lr if recipe.adapter.rank else optimizer.lr
    warmup = min(optimizer.warmup, arguments.steps // 10)
    changed = replace(
        usual,
        name="screen",
        data=recipe.data,
        optimizer=replace(optimizer, lr=lr, warmup_steps=warmup, warmup_ratio=0.0),
        objective=Objective(ar_weight=1.0, diffusion_weight=0.0),
        evaluation=Evaluation(every=arguments.steps, prompts=arguments.held_out),
        save=Save(every=1),
    )
    file = place / "screen.toml"
    file.write_text(changed.to_toml(), encoding="utf-8")
    return Options(
        source=arguments.source, data=tuple(f"{path}:1.0" for path in files), recipe=str(file), out=place / "out",
        steps=arguments.steps, device=arguments.device, seed=arguments.seed,
        kernels=arguments.kernels, skip_bad_lines=arguments.skip_bad_lines, eval_data=arguments.eval_data,
    )


def _mix(text: str) -> Mix:
    match = re.fullmatch(r"([\w.+-]+)=(.+)", text, re.DOTALL)
    if not match:
        raise UsageError(f"--mix {text}: write NAME=PATH[:WEIGHT],PATH[:WEIGHT]; names: letters, digits, . + - _")
    specs = tuple(parse_source(part) for part in match[2].split(",") if part)
    paths = [spec.path.resolve() for spec in specs]
    if not specs or len(set(paths)) < len(paths):
        raise UsageError(f"--mix {text}: {'names no file' if not specs else 'names a file twice'}")
    return Mix(match[1], specs)
