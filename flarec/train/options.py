"""What a conversion is asked to do: the arguments of `flarec convert`, and the checks that need no model."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ..base.fields import option_name
from ..base.files import check_apart, check_name
from ..base.lock import check_free
from ..checkpoint.own import check_destination, is_own
from ..errors import RecipeError, UsageError
from ..frontend.source.gguf import gguf_file
from ..recipe import Reading, Recipe, load_recipe
from ..recipe.aliases import SEED, spellings
from ..recipe.files import recipe_files
from .arguments import Arguments
from .data.sources import parse_source
from .state import StateDirectory


@dataclass(frozen=True)
class Options(Arguments):
    """Arguments of a conversion, and what follows from them.

    plain: a plain copy of the source, which is opened in its place (`flarec.train.plain_source`)
    """

    plain: Path | None = None

    @property
    def location(self) -> str:
        """What is opened."""
        return self.source if self.plain is None else str(self.plain)

    @property
    def output(self) -> Path:
        out = self.out or Path(f"{Path(self.source).resolve().name}-flarec")
        # `.`, `..` and the like have no name to put anything beside
        return Path(os.path.realpath(out)) if out.name in ("", "..") else out

    @property
    def _gguf(self) -> Path | None:
        return gguf_file(self.source, self.gguf)

    @property
    def state_directory(self) -> StateDirectory:
        return StateDirectory(self.output.with_name(f"{self.output.name}.partial"))

    def __post_init__(self) -> None:
        super().__post_init__()
        seed = self._seed()
        if seed is not None and self.seed not in (0, seed):
            raise RecipeError(f"--seed {self.seed} and seed = {seed} of the recipe are given: leave one of them out")
        object.__setattr__(self, "seed", self.seed if seed is None else seed)

    def _seed(self) -> int | None:
        """That a recipe or an override states under transformers' name."""
        reading = Reading()
        seeds = [text for text in self.overrides if text.partition("=")[0].strip() == SEED]
        load_recipe(self.recipe, reading).override(seeds, reading)
        return reading.seed

    def own_recipe(self, reading: Reading | None = None) -> Recipe:
        """The recipe as it is without overrides. Raises `RecipeError`."""
        return load_recipe(self.recipe, reading)

    def load_recipe(self, reading: Reading | None = None) -> Recipe:
        """The recipe with all overrides; what names of transformers became is noted in `reading`. Raises `RecipeError`.
        """
        given = [self._short(path, value, option) for path, value, option in (
            ("optimizer.steps", self.steps, "--steps"), ("data.max_length", self.max_length, "--max-length"),
        ) if value is not None]
        recipe = self.own_recipe(reading).override([*self.overrides, *given], reading)
        recipe = replace(recipe, passes=(*recipe.passes, *self.passes))
        self._check_adapter(recipe)
        for key, size in recipe.diffusion.block_sizes():
            if size > recipe.data.max_length:
                raise RecipeError(
                    f"{key} = {size} is larger than data.max_length = {recipe.data.max_length}; choose a smaller block "
                    "or longer rows"
                )
        return recipe

    def _short(self, path: str, value: int, option: str) -> str:
        """The override that an option of its own stands for. Raises `RecipeError` if --set gives the key as well."""
        for text in self.overrides:
            if text.partition("=")[0].strip() in spellings(path):
                raise RecipeError(f"{option} {value} and --set {text} are the same key: leave one of them out")
        return f"{path}={value}"

    def _check_adapter(self, recipe: Recipe) -> None:
        """As `check_no_adapter`, as far as a recipe tells: a plugin's pass may bring an adapter."""
        if not (recipe.adapter.rank or recipe.passes):
            self.check_no_adapter()

    def check_no_adapter(self) -> None:
        """Raise `UsageError` for options that only an adapter has: this run trains none."""
        if not (self.adapter_only or self.link):
            return
        option = "--adapter-only" if self.adapter_only else "--link"
        raise UsageError(f"{option} is for an adapter, and this recipe trains the model itself; set adapter.rank")

    def check_shards(self, recipe: Recipe) -> None:
        """Raise `UsageError` for a size of weight files where none is written."""
        if recipe.adapter.rank and self.max_shard_size != Arguments.max_shard_size:
            raise UsageError(
                f"--max-shard-size {self.max_shard_size} is for weights that are written anew, and over an adapter the "
                "weight files are the source's own; leave it out, or train the model itself (--recipe dual)"
            )

    def check_prompts(self) -> None:
        """Raise `UsageError` for options of answers without prompts to be answered: they would do nothing."""
        if self.prompts is not None:
            return
        for item in fields(Arguments):
            given = getattr(self, item.name) != item.default
            if given and item.metadata["doc"].startswith("With --prompts:"):
                raise UsageError(f"{option_name(item)} is for --prompts FILE, whose answers it is about; leave it out")

    def check_output(self, source: Path, *, locked: bool = False) -> None:
        """Raise `UsageError` or `CheckpointError` if the output directory is in use, not wanted, or would cost files.

        source: the directory that holds the source. locked: this process holds the lock on the output. Changes nothing.
        """
        check_name(self.output)
        out, state = self.output, self.state_directory
        data = [parse_source(text).path for text in [*self.data, *self.eval_data]]
        inputs = [Path(self.source), source, *data, *recipe_files(self.recipe), *map(Path, self.plugins)]
        inputs += [Path(path) for path in (self.prompts, self.merge_adapter, self._gguf) if path]
        check_apart([out, state.path], inputs)
        # what a killed run left is removed or finished once the lock is taken; a run to be resumed may be complete
        later = not locked and (bool(check_free(out)) or (self.resume and is_own(out)))
        if not later:
            check_destination(out, self.overwrite)
        if self.resume and not later and not state.in_use:
            raise UsageError(f"there is nothing to resume: {state.path} holds no run; start without --resume")
        state.check_own(whole=not self.resume)
        if not self.resume and not self.overwrite and state.in_use:
            raise UsageError(
                f"{state.path} holds an interrupted run: continue it with --resume, or start again with --overwrite"
            )
