"""What a conversion is asked to do, declared once: Python and the command line share it.

No import of torch: the command line builds its options from the fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypedDict, get_args

from ..base.fields import LARGEST, TEXTS, allowed_values, field_types, is_number, key, plain, shown
from ..base.generation import HOTTEST
from ..errors import UsageError

ANSWER_TOKENS = 512
"""New tokens of an answer of the source, at most."""


DEFAULT_RECIPE = "adapter-dual"
"""Keeps the source's own answers, and has nearly the drafts of all weights trained (docs/quality.md)."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of `flarec convert`; a list of texts may be one text, and a text a path.

    Raises `UsageError` with the argument, its value and what it takes.
    """

    source: str = key(MISSING, "A model directory or hub id.")
    data: TEXTS = key(
        (), "Training data: a JSONL, JSON or Parquet file, or a directory of them or of datasets, with messages, "
        "prompt and response, or text. Repeat to mix several by weight.", metavar="PATH[:WEIGHT]",
    )
    recipe: str = key(DEFAULT_RECIPE, "A built-in recipe or a TOML file.", metavar="NAME|FILE")
    out: Path | None = key(
        None, "Directory of the checkpoint. Default: the name of SOURCE with -flarec.", metavar="DIR"
    )
    overrides: TEXTS = key(
        (), "Change a recipe key, for example diffusion.block_size=8. Repeat for more.", metavar="KEY=VALUE",
        option="--set",
    )
    steps: int | None = key(
        None, "Optimizer steps (optimizer.steps). With --resume another number shortens or extends the run: steps that "
        "were taken stay, and schedule and phases follow the new number.",
    )
    max_length: int | None = key(None, "Tokens per packed row (data.max_length).")
    device: str = key("auto", "Where to train.", metavar="auto|cpu|cuda")
    seed: int = key(0, "Seed of data order and noise.", low=0, high=LARGEST)
    resume: bool = key(False, "Continue an interrupted run; give the same arguments again.")
    stop_after: int | None = key(
        None, "Save and end after this step, without a checkpoint; the schedule stays that of all steps. Go on with "
        "--resume, or write what there is with `flarec finish`.", low=1, high=LARGEST, metavar="STEP",
    )
    overwrite: bool = key(False, "Replace DIR once the new checkpoint is complete.")
    skip_bad_lines: bool = key(False, "Skip and count records that cannot be used.")
    eval_data: TEXTS = key(
        (), "Documents to evaluate on. Default: some are held out of the training data.", metavar="PATH"
    )
    kernels: str = key(
        "auto", "What computes the token mixers: triton, torch, reference, or auto (triton on CUDA, torch elsewhere).",
        metavar="NAME",
    )
    max_shard_size: str = key(
        "50GB", "Split weights that are larger into several files, for example 5GB.", metavar="SIZE"
    )
    plugins: TEXTS = key(
        (), "A Python file that defines passes; its code runs. Repeat for more. Installed plugins need no option.",
        metavar="FILE.py", option="--plugin",
    )
    passes: TEXTS = key(
        (), "Add a plugin's pass at the latest place that its requirements allow; NAME(...)@after:OTHER pins it. "
        "Repeat for more. `flarec passes` lists them.", metavar="'NAME(OPTION=VALUE)'", option="--pass",
    )
    prompts: Path | None = key(
        None, "Let SOURCE answer these prompts first and train on the answers, kept beside DIR (see `flarec answers`).",
        metavar="FILE",
    )
    chat: bool = key(False, "With --prompts: put each prompt into the chat template.")
    samples: int = key(1, "With --prompts: answers per prompt.", low=1, high=LARGEST, metavar="N")
    temperature: float = key(0.0, "With --prompts: of the answers; 0 is greedy.", low=0, high=HOTTEST, metavar="T")
    answer_tokens: int = key(
        ANSWER_TOKENS, "With --prompts: an answer without an end within so many tokens is dropped.",
        low=1, high=LARGEST, metavar="N",
    )
    report_to: str = key(
        "none", "Trackers, joined by commas: tensorboard, wandb, trackio. A resumed run goes on where they are.",
        metavar="NAMES",
    )
    push_to_hub: str | None = key(
        None, "Upload DIR to this model repository of the Hugging Face hub once it is complete.", metavar="REPO"
    )
    dequantize: bool = key(
        False, "Train quantised weights as bfloat16 (docs/sources.md lists the formats); with an adapter recipe the "
        "files stay as they are."
    )
    gguf: str | None = key(
        None, "The GGUF file in SOURCE that holds the model, dequantised; SOURCE may be such a file itself.",
        metavar="FILE",
    )
    merge_adapter: str | None = key(
        None, "Merge an adapter of peft into SOURCE first (needs peft).", metavar="DIR"
    )
    adapter_only: bool = key(False, "With an adapter recipe: write the adapter without the model (see --adapter).")
    link: bool = key(False, "With an adapter recipe: link the source's weight files into DIR instead of copying them.")
    debug: bool = key(False, "Check every property again after every pass.")

    def __post_init__(self) -> None:
        for item in fields(Arguments):
            value = read_value(item.name, getattr(self, item.name), field_types(Arguments)[item.name], item.metadata)
            object.__setattr__(self, item.name, value)


class ConversionKeywords(TypedDict, total=False):
    """The optional fields of `Arguments` as keyword arguments, for type checkers (a test compares the two)."""

    recipe: str | Path
    out: str | Path | None
    overrides: str | Sequence[str]
    steps: int | None
    max_length: int | None
    device: str
    seed: int
    resume: bool
    stop_after: int | None
    overwrite: bool
    skip_bad_lines: bool
    eval_data: str | Path | Sequence[str | Path]
    kernels: str
    max_shard_size: str
    plugins: str | Path | Sequence[str | Path]
    passes: str | Sequence[str]
    prompts: str | Path | None
    chat: bool
    samples: int
    temperature: float
    answer_tokens: int
    report_to: str
    push_to_hub: str | None
    dequantize: bool
    gguf: str | None
    merge_adapter: str | None
    adapter_only: bool
    link: bool
    debug: bool


def read_value(name: str, value: Any, hint: Any, metadata: Any) -> Any:
    """A value of a caller as the field's type. Raises `UsageError` with the field, its value and what it takes."""
    if hint == TEXTS:
        items = [value] if isinstance(value, (str, Path)) or not isinstance(value, Iterable) else list(value)
        return tuple(_text(name, item) for item in items)
    if value is None and NoneType in get_args(hint):
        return None
    if hint is str or str in get_args(hint):
        return _text(name, value)
    if hint is Path or Path in get_args(hint):
        return Path(_text(name, value))
    if hint is bool:
        if not isinstance(value, bool):
            raise UsageError(f"{name} is {shown(value)}; give True or False")
        return value
    kind, number = (float if float in (hint, *get_args(hint)) else int), plain(value)
    if not is_number(number, kind, metadata):
        raise UsageError(f"{name} is {shown(value)}; give {allowed_values(kind, metadata)}")
    return kind(number)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, (str, Path)) or "\0" in str(value) or value == "":
        raise UsageError(f"{name} is {shown(value)}; give text or a path")
    return str(value)
