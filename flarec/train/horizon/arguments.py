"""What `flarec train-head` is asked for, declared once for Python and the command line.

No import of torch: the command line builds its options from the fields.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from ...base.fields import LARGEST, TEXTS, field_types, key
from ...errors import UsageError
from ..arguments import read_value


@dataclass(frozen=True, kw_only=True)
class HeadArguments:
    """The arguments of `flarec train-head`.

    Raises `UsageError` with the argument, its value and what it takes.
    """

    checkpoint: str = key(MISSING, "A converted checkpoint, or with --adapter the source model.")
    data: TEXTS = key(
        MISSING, "Texts as the model writes them: what it was converted on, best its own answers. Files as for `flarec "
        "convert`.", metavar="PATH[:WEIGHT]",
    )
    out: Path = key(MISSING, "Directory of the checkpoint with the head.", metavar="DIR")
    rows: int = key(256, "Packed rows of which drafts are measured.", low=1, high=LARGEST, metavar="N")
    max_length: int | None = key(
        None, "Tokens per packed row. Default: that of the conversion.", low=2, high=LARGEST, metavar="N"
    )
    steps: int = key(2000, "Optimizer steps of the head, on what was measured.", low=1, high=LARGEST, metavar="N")
    batch: int = key(512, "Places in the text per step.", low=1, high=LARGEST, metavar="N")
    lr: float = key(1e-3, "Peak learning rate; it falls to 0.", above=0, metavar="RATE")
    width: int = key(256, "Width of the head's inner layer.", low=1, high=1 << 20, metavar="N")
    sigma: float = key(
        0.5, "Standard deviation of the soft targets around the measured number, in drafts.", above=0, high=LARGEST,
        metavar="S",
    )
    held_out: int = key(8, "Documents that the head is measured on and not trained on.", low=1, high=LARGEST,
                        metavar="N")
    seed: int = key(0, "Equal seeds give equal heads.", low=0, high=LARGEST)
    device: str = key("auto", "auto, cpu, cuda, cuda:1 ...", metavar="NAME")
    dtype: str | None = key(
        None, "float32, bfloat16, float16. Default: float32 on the CPU, else as stored.", metavar="NAME"
    )
    kernels: str = key("auto", "What computes the token mixers: triton, torch, reference, or auto.", metavar="NAME")
    adapter: Path | None = key(
        None, "What `flarec convert --adapter-only` wrote for this model; the head goes into a copy of it.",
        metavar="DIR",
    )
    skip_bad_lines: bool = key(False, "Skip and count records that cannot be used.")
    link: bool = key(False, "Link the weight files into DIR instead of copying them.")
    overwrite: bool = key(False, "Replace DIR once the new checkpoint is complete.")

    def __post_init__(self) -> None:
        types = field_types(HeadArguments)
        for item in fields(self):
            value = read_value(item.name, getattr(self, item.name), types[item.name], item.metadata)
            object.__setattr__(self, item.name, value)
        if not self.data:
            raise UsageError("data is empty; give at least one file with texts")
