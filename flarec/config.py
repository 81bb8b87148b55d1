"""Recipes: typed data that says how a model is converted. TOML outside, frozen dataclasses inside.

Every key has a documentation string and limits in its field's metadata; the same table drives validation, `--set`
overrides, error messages and `flarec recipes NAME`. Contract of the objective: docs/semantics.md section 3.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tomli_w

from flarec import recipes

from .errors import RecipeError

Readout = Literal["block_end", "causal"]


def _key(
    default: Any, doc: str, *, low: float | None = None, high: float | None = None, above: float | None = None
) -> Any:
    """A documented key: `low` and `high` are inclusive limits, `above` an exclusive lower one."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "above": above})


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Types of a section's keys, resolved once."""
    return get_type_hints(cls)


@dataclass(frozen=True)
class Section:
    """Base of all sections: coerces and checks every key on construction. `path` is the section's dotted name."""

    path: ClassVar[str] = ""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        hints = _hints(cls)
        for item in fields(self):
            name = f"{self.path}.{item.name}" if self.path else item.name
            value = _coerce(name, getattr(self, item.name), hints[item.name], item.metadata)
            object.__setattr__(self, item.name, value)


@dataclass(frozen=True)
class BlockKind(Section):
    """How a noisy block is masked, read and supervised."""

    path: ClassVar[str] = "diffusion"
    mask: Literal["random", "all"] = _key(
        "random", "random: a mask rate per block, uniform on [0, 1], stratified; all: every position masked"
    )
    views: Literal[1, 2] = _key(2, "noisy copies of a block; with 2 the second view masks the complement of the first")
    supervise: Literal["masked-input", "masked-target", "masked-both"] = _key(
        "masked-input",
        "which noisy positions count: those whose own token is masked (published), those that cannot see the token "
        "they predict, or those for which both hold; a target with two signals gives each the weight 1/2",
    )
    readout: Literal["block_end", "causal"] = _key(
        "block_end", "what a noisy token reads of its own block: all of it (block_end), or up to itself (causal)"
    )
    loss: Literal["ce", "kl"] = _key(
        "ce", "ce: cross entropy with the next token; kl: KL from the clean stream's distribution for the same target"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask == "all" and self.views == 2:
            raise RecipeError(
                f'{self.path}.views = 2 needs {self.path}.mask = "random": the complement of a fully masked view '
                f"masks nothing; set {self.path}.views = 1"
            )


@dataclass(frozen=True)
class SecondKind(BlockKind):
    """A second kind of block, drawn instead of the first with some probability. Its defaults are those of `draft`."""

    path: ClassVar[str] = "diffusion.second"
    probability: float = _key(
        0.0, "probability that a block is of this second kind instead of the first; 0 switches it off", low=0, high=1
    )
    mask: Literal["random", "all"] = _key("all", "as diffusion.mask, for the second kind")
    views: Literal[1, 2] = _key(1, "as diffusion.views, for the second kind")
    supervise: Literal["masked-input", "masked-target", "masked-both"] = _key(
        "masked-input", "as diffusion.supervise, for the second kind"
    )
    readout: Literal["block_end", "causal"] = _key("causal", "as diffusion.readout, for the second kind")
    loss: Literal["ce", "kl"] = _key("kl", "as diffusion.loss, for the second kind")


@dataclass(frozen=True)
class Diffusion(BlockKind):
    """The noisy blocks of training: their size, their kind, and an optional second kind."""

    block_size: int = _key(4, "noisy positions per block; the publication leaves it open, 4 is our choice", low=1)
    second: SecondKind = field(default_factory=SecondKind)

    @property
    def kinds(self) -> tuple[tuple[float, BlockKind], ...]:
        """(probability, kind) of the kinds that can be drawn, first kind first; probabilities add to 1."""
        pairs: tuple[tuple[float, BlockKind], ...] = (
            (1.0 - self.second.probability, self),
            (self.second.probability, self.second),
        )
        return tuple(pair for pair in pairs if pair[0] > 0)


@dataclass(frozen=True)
class Objective(Section):
    """Weights of the two losses; each loss is a mean over its own supervised targets of an optimizer step."""

    path: ClassVar[str] = "objective"
    ar_weight: float = _key(1.0, "weight of the autoregressive loss (small values damage the model)", low=0)
    diffusion_weight: float = _key(1.0, "weight of the diffusion loss; 0 trains the clean stream alone", low=0)


@dataclass(frozen=True)
class Optimizer(Section):
    """AdamW and its schedule; `lr`, warmup, schedule, decay and clip defaults are the published ones."""

    path: ClassVar[str] = "optimizer"
    steps: int = _key(1000, "optimizer steps", low=1)
    batch_rows: int = _key(8, "packed rows per optimizer step", low=1)
    micro_rows: int = _key(1, "packed rows per forward pass; gradients accumulate over the passes of a step", low=1)
    lr: float = _key(1e-5, "peak learning rate (published: 1e-5; a tiny model needs more)", above=0)
    betas: tuple[float, float] = _key((0.9, 0.999), "AdamW's decay rates of the two moments", low=0, high=0.999999)
    eps: float = _key(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = _key(0.0, "AdamW's decoupled weight decay", low=0)
    warmup_steps: int = _key(100, "steps of linear warmup; 0 for none", low=0)
    schedule: Literal["constant", "linear", "cosine"] = _key(
        "constant", "after the warmup: constant, or a decay to 0 at the last step (linear, cosine)"
    )
    clip: float = _key(1.0, "limit of the global gradient norm; 0 for none", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_rows % self.micro_rows:
            raise RecipeError(
                f"optimizer.batch_rows = {self.batch_rows} is not a multiple of optimizer.micro_rows = "
                f"{self.micro_rows}; choose values that divide"
            )

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        left = (self.steps - step) / max(1, self.steps - self.warmup_steps)
        left = min(1.0, max(0.0, left))
        return self.lr * (left if self.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


@dataclass(frozen=True)
class Data(Section):
    """Packing of documents into rows."""

    path: ClassVar[str] = "data"
    max_length: int = _key(2048, "clean tokens per packed row; longer documents are truncated and counted", low=2)
    lookahead: int = _key(64, "documents the packer may choose from when it fills a row", low=1)


@dataclass(frozen=True)
class Evaluation(Section):
    """A short held-out decode during training: training accuracy does not predict acceptance."""

    path: ClassVar[str] = "evaluation"
    every: int = _key(200, "steps between evaluations; 0 for none", low=0)
    prompts: int = _key(8, "held-out documents to decode (taken out of the training data)", low=1)
    max_new_tokens: int = _key(64, "new tokens per prompt", low=1)


@dataclass(frozen=True)
class Save(Section):
    """Training state on disk."""

    path: ClassVar[str] = "save"
    every: int = _key(200, "steps between saves of the training state; an interruption loses at most this much", low=1)


@dataclass(frozen=True)
class Decode(Section):
    """Decoding defaults that go into the checkpoint."""

    path: ClassVar[str] = "decode"
    ar_trust_readout: Literal["auto", "block_end", "causal"] = _key(
        "auto", "readout of draft blocks in AR-Trust; auto: causal if a kind of block trains it, else block_end"
    )
    diffusion_trust_readout: Literal["auto", "block_end", "causal"] = _key(
        "auto", "readout of blocks in Diffusion-Trust; auto: block_end if a kind of block trains it, else causal"
    )
    drafts: Literal["branches", "single"] = _key(
        "branches", "AR-Trust: a draft block per possible accepted length, or one block (the published scheme)"
    )
    confidence_threshold: float = _key(0.9, "Diffusion-Trust commits every position this confident", low=0, high=1)
    denoising_steps: int = _key(0, "Diffusion-Trust: most steps per block; 0 for the block size", low=0)


@dataclass(frozen=True)
class Recipe(Section):
    """Everything that decides a conversion except the model, the data files and the seed."""

    name: str = _key("custom", "the recipe's name")
    description: str = _key("", "one sentence for lists")
    mask_token: Literal["auto", "row", "vector"] = _key(
        "auto",
        "what stands for a masked token: a spare row of a padded vocabulary (row), a separate learned vector (vector), "
        "or the row if the model has one (auto)",
    )
    diffusion: Diffusion = field(default_factory=Diffusion)
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    data: Data = field(default_factory=Data)
    evaluation: Evaluation = field(default_factory=Evaluation)
    save: Save = field(default_factory=Save)
    decode: Decode = field(default_factory=Decode)

    def __post_init__(self) -> None:
        super().__post_init__()
        trained = {kind.readout for _, kind in self.diffusion.kinds}
        for mode, readout in self.readouts().items():
            if readout not in trained:
                key = f"decode.{mode.replace('-', '_')}_readout"
                raise RecipeError(f'{key} = "{readout}", but no kind of block trains that readout; set {key} = "auto"')

    def readouts(self) -> dict[str, Readout]:
        """The readout of each decoding mode ("ar-trust", "diffusion-trust"), with `auto` resolved."""
        trained = {kind.readout for _, kind in self.diffusion.kinds}
        draft: Readout = "causal" if "causal" in trained else "block_end"
        denoise: Readout = "block_end" if "block_end" in trained else "causal"
        chosen = self.decode
        return {
            "ar-trust": draft if chosen.ar_trust_readout == "auto" else chosen.ar_trust_readout,
            "diffusion-trust": denoise if chosen.diffusion_trust_readout == "auto" else chosen.diffusion_trust_readout,
        }

    def override(self, assignments: Sequence[str]) -> Recipe:
        """A recipe with `key=value` strings applied together, for example `diffusion.block_size=8`.

        Raises `RecipeError` for a missing "=", an unknown key (with the nearest name) or a value out of range.
        """
        table = self.to_dict()
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            path, text = path.strip(), text.strip()
            if not equals:
                raise RecipeError(f'cannot read "{assignment}": write key=value, for example diffusion.block_size=4')
            section, (name, hint, metadata) = table, _find(path)
            for part in path.split(".")[:-1]:
                section = section[part]
            section[name] = _coerce(path, _parse(path, text, hint), hint, metadata)
        return Recipe.from_dict(table)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values (JSON and TOML can hold them); `Recipe.from_dict` is the inverse."""
        table: dict[str, Any] = _plain(self)
        return table

    def to_toml(self) -> str:
        """The whole recipe as TOML text; `recipe_from_toml` is the inverse."""
        return tomli_w.dumps(self.to_dict())

    @staticmethod
    def from_dict(table: Mapping[str, Any]) -> Recipe:
        """A recipe from nested values; missing keys take their defaults, unknown ones raise `RecipeError`."""
        recipe = _build(Recipe, table)
        assert isinstance(recipe, Recipe)
        return recipe

    def describe(self) -> list[Entry]:
        """Every key with its value in this recipe, its documentation and what is allowed, in file order."""
        return [
            Entry(path, _lookup(self, path), " ".join(filter(None, [metadata["doc"], f"[{_allowed(hint, metadata)}]"])))
            for path, (_, hint, metadata) in _keys(Recipe)
        ]


class Entry(NamedTuple):
    """One documented key."""

    key: str
    value: Any
    doc: str


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A built-in recipe by name, or one from a TOML file. Raises `RecipeError` naming the recipe or file."""
    table = _table(str(name_or_path), Path(), ())
    try:
        return Recipe.from_dict(table)
    except RecipeError as error:
        raise RecipeError(f"recipe {name_or_path}: {error}") from None


def recipe_from_toml(text: str) -> Recipe:
    """The recipe that `Recipe.to_toml` wrote."""
    return Recipe.from_dict(tomllib.loads(text))


def _table(source: str, folder: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """The merged tables of a recipe and its bases; `folder` is where relative paths start."""
    if source in recipes.NAMES:
        identity, text, folder = source, recipes.read(source), Path()
    else:
        path = folder / source
        if not path.is_file():
            near = difflib.get_close_matches(source, recipes.NAMES, 1)
            hint = f"did you mean {near[0]}?" if near else f"built-in recipes are {', '.join(recipes.NAMES)}."
            raise RecipeError(f'"{source}" is neither a built-in recipe nor a TOML file; {hint}')
        identity, folder = str(path.resolve()), path.parent
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {path}: cannot be read ({error})") from None
    if identity in seen:
        raise RecipeError(f"recipe {source} is its own base; remove one `base` line")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {source}: not TOML: {error}") from None
    base = table.pop("base", None)
    if source not in recipes.NAMES:
        table.setdefault("name", Path(source).stem)
    if base is None:
        return table
    if not isinstance(base, str):
        raise RecipeError(f"recipe {source}: base = {base!r} is not text; give a recipe's name or a path")
    return _merge(_table(base, folder, (*seen, identity)), table)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merge(base[key], top[key]) for key in base.keys() & top.keys() if _tables(base[key], top[key])}
    return {**base, **top, **both}


def _tables(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _keys(cls: Any, prefix: str = "") -> Iterator[tuple[str, tuple[str, Any, Mapping[str, Any]]]]:
    """(dotted path, (name, type, metadata)) of every key; a section's own keys come before its subsections."""
    hints = _hints(cls)
    leaves = [item for item in fields(cls) if not is_dataclass(hints[item.name])]
    for item in leaves:
        yield prefix + item.name, (item.name, hints[item.name], item.metadata)
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            yield from _keys(hints[item.name], f"{prefix}{item.name}.")


def _find(path: str) -> tuple[str, Any, Mapping[str, Any]]:
    keys = dict(_keys(Recipe))
    if path in keys:
        return keys[path]
    by_name = {full.rpartition(".")[2]: full for full in keys}
    near = difflib.get_close_matches(path, keys, 1, 0.7)
    near = near or [by_name[name] for name in difflib.get_close_matches(path.rpartition(".")[2], by_name, 1)]
    hint = f"did you mean {near[0]}?" if near else "`flarec recipes NAME` lists the keys."
    raise RecipeError(f"unknown recipe key {path}; {hint}")


def _lookup(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _build(cls: Any, table: Mapping[str, Any], prefix: str = "") -> Any:
    hints = {item.name: _hints(cls)[item.name] for item in fields(cls)}
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in hints:
            _find(prefix + name)
        elif is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{prefix}{name} is a section, not a value; write [{prefix}{name}] and its keys")
            values[name] = _build(hints[name], value, f"{prefix}{name}.")
        else:
            values[name] = value
    return cls(**values)


def _parse(path: str, text: str, hint: Any) -> Any:
    """The text of an override as a TOML value; bare words are text."""
    if hint is str or (get_origin(hint) is Literal and isinstance(get_args(hint)[0], str)):
        return text.strip("\"'")
    if get_origin(hint) is tuple and not text.startswith("["):
        text = f"[{text}]"
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _coerce(path: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """The value in its declared type, or a `RecipeError` naming key, value and what is allowed."""
    if is_dataclass(hint):
        good, result = isinstance(value, hint) if isinstance(hint, type) else False, value
    elif get_origin(hint) is Literal:
        good, result = any(value == choice and type(value) is type(choice) for choice in get_args(hint)), value
    elif get_origin(hint) is tuple:
        good = isinstance(value, (list, tuple)) and len(value) == len(get_args(hint))
        good = good and all(_number(item, float, metadata) for item in value)
        result = tuple(float(item) for item in value) if good else value
    elif hint is str:
        good, result = isinstance(value, str), value
    else:
        good = _number(value, hint, metadata)
        result = hint(value) if good else value
    if not good:
        raise RecipeError(f"{path} = {value!r} is not allowed; give {_allowed(hint, metadata)}")
    return result


def _number(value: Any, kind: type, metadata: Mapping[str, Any]) -> bool:
    right_type = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not right_type or not math.isfinite(value):
        return False
    low, high, above = metadata["low"], metadata["high"], metadata["above"]
    return (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)


def _allowed(hint: Any, metadata: Mapping[str, Any]) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(str(choice) for choice in get_args(hint))
    if hint is str:
        return "text"
    if get_origin(hint) is tuple:
        words = f"{len(get_args(hint))} numbers"
    else:
        words = "a whole number" if hint is int else "a number"
    limits = {"at least": metadata.get("low"), "above": metadata.get("above"), "at most": metadata.get("high")}
    return ", ".join([words, *(f"{word} {limit}" for word, limit in limits.items() if limit is not None)])
