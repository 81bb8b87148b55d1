"""Recipes: typed data that says how a model is converted. TOML outside, frozen dataclasses inside.

Every key has a documentation string and limits in its field's metadata; the same table drives validation, `--set`
overrides, error messages and `flarec recipes NAME`. Contract of the objective: docs/semantics.md section 3.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import tomli_w

from ..base.fields import allowed_values, key
from ..errors import RecipeError
from . import aliases
from .aliases import Reading
from .diffusion import Diffusion, Readout, Section
from .keys import coerce, keys_of, parse_value, plain_values, types_of, value_of


@dataclass(frozen=True)
class Objective(Section):
    """Weights of the two losses; each loss is a mean over its own supervised targets of an optimizer step."""

    path: ClassVar[str] = "objective"
    ar_weight: float = key(1.0, "weight of the autoregressive loss (small values damage the model)", low=0)
    diffusion_weight: float = key(
        1.0, "weight of the diffusion loss; 0 trains the clean stream alone, without noisy tokens", low=0
    )


@dataclass(frozen=True)
class Adapter(Section):
    """A low-rank adapter on noisy rows alone instead of full fine-tuning (docs/semantics.md section 6)."""

    path: ClassVar[str] = "adapter"
    rank: int = key(
        0, "rank of the adapter that noisy rows go through, over a frozen model; 0 trains the model itself", low=0
    )
    alpha: float = key(64.0, "the adapter's result is scaled by alpha / rank", above=0)
    targets: str = key(
        "all-linear",
        "linear layers with an adapter: all-linear (of decoder layers, without routers and head), names of modules "
        "joined by + (q_proj+v_proj), or a regular expression for whole names",
    )
    base: Literal["stored", "int8", "nf4"] = key(
        "stored",
        "what the frozen model's matrices are held in while the adapter learns: stored: as they are; int8: 8 bits, a "
        "scale per row; nf4: 4 bits (QLoRA; needs bitsandbytes). Less memory, and drafts learn from a clean stream of "
        "these codes; the checkpoint's weights are the source's all the same",
    )


@dataclass(frozen=True)
class Optimizer(Section):
    """AdamW, its schedule and its numbers; `lr`, warmup, schedule, decay and clip defaults are the published ones."""

    path: ClassVar[str] = "optimizer"
    steps: int = key(1000, "optimizer steps", low=1)
    batch_rows: int = key(8, "packed rows per optimizer step", low=1)
    micro_rows: int = key(1, "packed rows per forward pass; gradients accumulate over the passes of a step", low=1)
    lr: float = key(1e-5, "peak learning rate (published: 1e-5; a tiny model needs more)", above=0)
    betas: tuple[float, float] = key((0.9, 0.999), "AdamW's decay rates of the two moments", low=0, high=0.999999)
    eps: float = key(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = key(0.0, "AdamW's decoupled weight decay", low=0)
    warmup_steps: int = key(100, "steps of linear warmup; 0 for none", low=0)
    warmup_ratio: float = key(0.0, "warmup as a part of the steps, instead of warmup_steps; 0 for none", low=0, high=1)
    schedule: Literal["constant", "linear", "cosine"] = key(
        "constant", "after the warmup: constant, or a decay to 0 at the last step (linear, cosine)"
    )
    clip: float = key(1.0, "limit of the global gradient norm; 0 for none", low=0)
    precision: Literal["auto", "bf16", "float32"] = key(
        "auto",
        "bf16: compute in bfloat16, with float32 weights, gradient sums and moments in the optimizer; float32: compute "
        "in float32, too; auto: bf16 on a GPU, float32 on a CPU",
    )
    moments: Literal["float32", "8bit"] = key(
        "float32",
        "AdamW's two moments: float32: 8 bytes of a trained parameter; 8bit: 2 bytes, codes with a scale per block of "
        "256 (AdamW8bit of bitsandbytes and torchao); parameters of less than 4096 elements stay in float32",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_rows % min(self.batch_rows, self.micro_rows):
            raise RecipeError(
                f"optimizer.batch_rows = {self.batch_rows} is not a multiple of optimizer.micro_rows = "
                f"{self.micro_rows}; choose values that divide"
            )

    @property
    def warmup(self) -> int:
        """Steps of warmup."""
        return math.ceil(self.warmup_ratio * self.steps) if self.warmup_ratio else self.warmup_steps

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        left = (self.steps - step) / max(1, self.steps - self.warmup)
        left = min(1.0, max(0.0, left))
        return self.lr * (left if self.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


@dataclass(frozen=True)
class Train(Section):
    """How a step is computed: results do not depend on it, or by rounding alone."""

    path: ClassVar[str] = "train"
    memory: Literal["auto", "keep", "recompute"] = key(
        "auto",
        "keep: what decoder layers compute is kept for the backward pass; recompute: of each layer its inputs are kept "
        "and the rest is computed again; auto: keep, with as many of the micro_rows as fit into the free memory, or "
        "recompute where not even one row does, and says so",
    )
    shard: Literal["auto", "optimizer", "parameters"] = key(
        "auto",
        "what several ranks cut into parts: optimizer: masters, gradient sums and moments; parameters: those of "
        "decoder layers as well, gathered while their layer runs; auto: parameters where what a rank has of the others "
        "would take more than half of the free memory",
    )
    compile: Literal["auto", "on", "off"] = key(
        "auto",
        "whether what lies between token mixers is compiled, region by region; the first steps take longer then; auto: "
        "on a GPU",
    )


@dataclass(frozen=True)
class Data(Section):
    """Packing of documents into rows."""

    path: ClassVar[str] = "data"
    max_length: int = key(2048, "clean tokens per packed row; longer documents are truncated and counted", low=2)
    lookahead: int = key(64, "documents the packer may choose from when it fills a row", low=1)


@dataclass(frozen=True)
class Evaluation(Section):
    """A short held-out decode during training: training accuracy does not predict acceptance."""

    path: ClassVar[str] = "evaluation"
    every: int = key(200, "steps between evaluations; 0 for none", low=0)
    prompts: int = key(8, "held-out documents to decode (taken out of the training data)", low=1)
    max_new_tokens: int = key(64, "new tokens per prompt", low=1)


@dataclass(frozen=True)
class Save(Section):
    """Training state on disk."""

    path: ClassVar[str] = "save"
    every: int = key(200, "steps between saves of the training state; an interruption loses at most this much", low=1)
    total_limit: int = key(2, "saves that are kept, the newest; the one before stands in for a damaged one", low=2)
    background: Literal["auto", "on", "off"] = key(
        "auto",
        "on: the state is copied to main memory and written while training goes on; off: training waits; auto: on "
        "where a GPU computes and main memory has room for the copy, which is said",
    )


@dataclass(frozen=True)
class Decode(Section):
    """Decoding defaults that go into the checkpoint."""

    path: ClassVar[str] = "decode"
    ar_trust_readout: Literal["auto", "block_end", "causal"] = key(
        "auto", "readout of draft blocks in AR-Trust; auto: causal if a kind of block trains it, else block_end"
    )
    diffusion_trust_readout: Literal["auto", "block_end", "causal"] = key(
        "auto", "readout of blocks in Diffusion-Trust; auto: block_end if a kind of block trains it, else causal"
    )
    drafts: Literal["branches", "single"] = key(
        "branches", "AR-Trust: a draft block per possible accepted length, or one block (the published scheme)"
    )
    confidence_threshold: float = key(0.9, "Diffusion-Trust commits every position this confident", low=0, high=1)
    denoising_steps: int = key(0, "Diffusion-Trust: most steps per block; 0 for the block size", low=0)
    recheck: float = key(
        1.0,
        "Diffusion-Trust and elastic: the clean stream takes back tokens that it finds less likely than this share of "
        "its own choice; 1 gives the text of causal decoding, 0 looks at none",
        low=0, high=1,
    )


@dataclass(frozen=True)
class Recipe(Section):
    """Everything that decides a conversion except the model, the data files and the seed."""

    name: str = key("custom", "the recipe's name")
    description: str = key("", "one sentence for lists")
    mask_token: Literal["auto", "row", "vector", "random"] = key(
        "auto",
        "what stands for a masked token: a spare row of a padded vocabulary (row), a separate learned vector (vector), "
        "any regular token, drawn at random (random; over a frozen model, for AR-Trust and elastic), or the row if the "
        "model has one and is trained, else the vector (auto)",
    )
    passes: tuple[str, ...] = key(
        (), 'passes of plugins for both pipelines, for example ["my-pass(option=1)"] (CONTRIBUTING.md, "Plugins")'
    )
    diffusion: Diffusion = field(default_factory=Diffusion)
    objective: Objective = field(default_factory=Objective)
    adapter: Adapter = field(default_factory=Adapter)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    data: Data = field(default_factory=Data)
    evaluation: Evaluation = field(default_factory=Evaluation)
    save: Save = field(default_factory=Save)
    decode: Decode = field(default_factory=Decode)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_adapter()
        if self.mask_token == "random":
            self._check_random_ids()
        trained = {kind.readout for _, kind in self.diffusion.kinds}
        for mode, readout in self.readouts().items():
            if readout not in trained:
                key = f"decode.{mode.replace('-', '_')}_readout"
                raise RecipeError(f'{key} = "{readout}", but no kind of block trains that readout; set {key} = "auto"')

    def diffusion_at(self, step: int) -> Diffusion:
        """The noisy blocks of optimizer step `step`, counted from 0."""
        return self.diffusion.at(step, self.optimizer.steps)

    def _check_adapter(self) -> None:
        """An adapter cannot change the clean stream, and nothing else of the model is trained."""
        rank, base = self.adapter.rank, self.adapter.base
        if base != "stored" and not rank:
            raise RecipeError(
                f'adapter.base = "{base}" is for recipes that freeze the model, and this one trains it; set '
                'adapter.base = "stored", or give --recipe adapter'
            )
        if base != "stored" and self.train.shard == "parameters":
            raise RecipeError(
                f'adapter.base = "{base}" holds the model as codes, which train.shard = "parameters" cannot cut; set '
                'train.shard = "optimizer"'
            )
        if rank and self.objective.ar_weight:
            raise RecipeError(
                f"adapter.rank = {rank} keeps the clean stream as it is, so its loss has no gradient; set "
                "objective.ar_weight = 0"
            )
        if rank and not self.objective.diffusion_weight:
            raise RecipeError(
                f"adapter.rank = {rank} trains noisy rows, and objective.diffusion_weight = 0 leaves them out; set it "
                "to 1"
            )
        if rank and self.mask_token == "row":
            raise RecipeError(
                f'adapter.rank = {rank} keeps every row of the embedding as it is; set mask_token = "vector" or "auto"'
            )

    def _check_random_ids(self) -> None:
        """Where no id says that a position is masked, the adapter has to, and there is nothing else to tell apart."""
        if not self.adapter.rank:
            raise RecipeError(
                'mask_token = "random" is for recipes that freeze the model: without an adapter a noisy row is '
                "computed as a clean one with its id, and cannot know that it is noise; give --recipe adapter, or set "
                'mask_token = "auto"'
            )
        half = next((kind.path for _, kind in self.diffusion.kinds if kind.mask == "random"), None)
        if half is not None:
            raise RecipeError(
                f'mask_token = "random" needs {half}.mask = "all": random ids do not say which positions of a block '
                'are masked and which are shown; give --recipe adapter, or set mask_token = "vector"'
            )
        if self.decode.diffusion_trust_readout != "auto":
            raise RecipeError(
                'decode.diffusion_trust_readout is for Diffusion-Trust, which mask_token = "random" cannot do, because '
                'its steps show a part of a block; leave it "auto"'
            )

    @property
    def mask_choice(self) -> Literal["auto", "row", "vector", "random"]:
        """`mask_token`, where a frozen model leaves a choice: the vector is no row of the embedding."""
        return "vector" if self.adapter.rank and self.mask_token != "random" else self.mask_token

    def readouts(self) -> dict[str, Readout]:
        """The readout of each decoding mode that the recipe is for ("ar-trust", "diffusion-trust"), with `auto`
        resolved."""
        trained = {kind.readout for _, kind in self.diffusion.kinds}
        draft: Readout = "causal" if "causal" in trained else "block_end"
        denoise: Readout = "block_end" if "block_end" in trained else "causal"
        chosen = self.decode
        readouts: dict[str, Readout] = {
            "ar-trust": draft if chosen.ar_trust_readout == "auto" else chosen.ar_trust_readout,
            "diffusion-trust": denoise if chosen.diffusion_trust_readout == "auto" else chosen.diffusion_trust_readout,
        }
        if self.mask_token == "random":
            del readouts["diffusion-trust"]
        return readouts

    def override(self, assignments: Sequence[str], reading: Reading | None = None) -> Recipe:
        """A recipe with `key=value` strings applied together, for example `diffusion.block_size=8`; names of
        transformers are keys too (`aliases`), and what they became is noted in `reading`.

        Raises `RecipeError` for a missing "=", an unknown key (with the nearest name) or a value out of range.
        """
        table, own, given = self.to_dict(), dict[str, Any](), dict[str, Any]()
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            path, text = path.strip(), text.strip()
            if not equals:
                raise RecipeError(f'cannot read "{assignment}": write key=value, for example diffusion.block_size=4')
            if path in aliases.NAMES:
                given[path] = parse_value(path, text, Any)
            else:
                own[path] = parse_value(path, text, _find(path)[1])
        own |= aliases.translated(given, own, lambda path: value_of(self, path), reading)
        for path, value in own.items():
            section, (name, hint, metadata) = table, _find(path)
            for part in path.split(".")[:-1]:
                section = section[part]
            section[name] = coerce(path, value, hint, metadata)
        return Recipe.from_dict(table)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values (JSON and TOML can hold them); `Recipe.from_dict` is the inverse."""
        table: dict[str, Any] = plain_values(self)
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

    def describe(self) -> list[RecipeKey]:
        """Every key with its value in this recipe, its documentation and what is allowed, in file order."""
        return [
            RecipeKey(path, value_of(self, path), f"{metadata['doc']} [{allowed_values(hint, metadata)}]".lstrip())
            for path, (_, hint, metadata) in keys_of(Recipe)
        ]


class RecipeKey(NamedTuple):
    """One documented key."""

    key: str
    value: Any
    doc: str


def recipe_from_toml(text: str) -> Recipe:
    """The recipe that `Recipe.to_toml` wrote."""
    return Recipe.from_dict(tomllib.loads(text))


def _find(path: str) -> tuple[str, Any, Mapping[str, Any]]:
    keys = dict(keys_of(Recipe))
    if path in keys:
        return keys[path]
    by_name = {full.rpartition(".")[2]: full for full in keys}
    last = path.rpartition(".")[2]
    aliases.check_not_refused(last)
    inside = [full for full in keys if full.startswith(f"{path}.")]
    if inside:
        raise RecipeError(f"{path} is a section of a recipe, not a key; give one of its keys: {', '.join(inside)}")
    near = [f"{last}, without a section"] if last in aliases.NAMES else difflib.get_close_matches(path, keys, 1, 0.7)
    near = near or [by_name[name] for name in difflib.get_close_matches(last, by_name, 1)]
    hint = f"did you mean {near[0]}?" if near else "`flarec recipes NAME` lists the keys."
    raise RecipeError(f"unknown recipe key {path}; {hint}")


def _build(cls: Any, table: Mapping[str, Any], prefix: str = "") -> Any:
    hints = {item.name: types_of(cls)[item.name] for item in fields(cls)}
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
