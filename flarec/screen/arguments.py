"""What `flarec screen` is asked to do, declared once for Python and the command line. No import of torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from ..base.fields import LARGEST, TEXTS, field_types, key, shown
from ..errors import UsageError
from ..train.arguments import DEFAULT_RECIPE, read_value


@dataclass(frozen=True)
class ScreenArguments:
    """The arguments of `flarec screen`. Raises `UsageError` with the argument, its value and what it takes."""

    source: str = key(MISSING, "A model directory or hub id.")
    mixes: TEXTS = key(
        (), "A mix of training data by a name of yours; weights as in --data of `flarec convert`. Give at least two.",
        metavar="NAME=PATH[:WEIGHT],PATH[:WEIGHT]", option="--mix",
    )
    steps: int = key(100, "Optimizer steps per mix.", low=1, high=LARGEST)
    lr: float | None = key(
        None, "Learning rate of these steps. Default: the recipe's; for an adapter's recipe that of `flare`.", above=0
    )
    held_out: int = key(
        64, "Documents of the one split that all mixes are measured on.", low=2, high=LARGEST, metavar="N"
    )
    eval_data: TEXTS = key(
        (), "Records to measure on; those with answer and pattern count for accuracy. Default: documents of the files, "
        "taken out of every mix.", metavar="PATH",
    )
    by: str = key("loss", "What decides: loss (held-out, per response token) or accuracy.", metavar="loss|accuracy")
    max_new_tokens: int = key(256, "New tokens of an answer, for accuracy.", low=1, high=LARGEST, metavar="N")
    recipe: str = key(
        DEFAULT_RECIPE, "Recipe of the conversion; its rows, rate and lengths are used here.", metavar="NAME|FILE"
    )
    overrides: TEXTS = key((), "Change a recipe key. Repeat for more.", metavar="KEY=VALUE", option="--set")
    max_length: int | None = key(None, "Tokens per packed row (data.max_length).")
    device: str = key("auto", "Where to train.", metavar="auto|cpu|cuda")
    seed: int = key(0, "Seed of the split and of the data order, the same for all mixes.", low=0, high=LARGEST)
    kernels: str = key("auto", "What computes the token mixers: triton, torch, reference, or auto.", metavar="NAME")
    skip_bad_lines: bool = key(False, "Skip and count records that cannot be used.")
    convert: Path | None = key(
        None, "Convert SOURCE with the best mix into this directory afterwards, by the recipe.", metavar="OUT"
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            hint = field_types(ScreenArguments)[item.name]
            value = read_value(item.name, getattr(self, item.name), hint, item.metadata)
            object.__setattr__(self, item.name, value)
        if self.by not in ("loss", "accuracy"):
            raise UsageError(f"by is {shown(self.by)}; give loss or accuracy")
        if self.by == "accuracy" and not self.eval_data:
            raise UsageError("--by accuracy needs --eval-data with records that have answer and pattern")
