"""What `flarec answers` is asked for, declared once for Python and the command line.

No import of torch: the command line builds its options from the fields.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from ...base.fields import LARGEST, TEXTS, field_types, key
from ...base.files import check_apart
from ...base.generation import HOTTEST
from ...errors import UsageError
from ..arguments import ANSWER_TOKENS, read_value


@dataclass(frozen=True, kw_only=True)
class AnswerArguments:
    """The arguments of `flarec answers`.

    Raises `UsageError` with the argument, its value and what it takes.
    """

    source: str = key(MISSING, "A model directory or hub id.")
    prompts: Path = key(
        MISSING, 'A prompt per line, or JSONL with "prompt" or "messages" (a closing assistant message is left out).',
        metavar="FILE",
    )
    out: Path = key(MISSING, "The answers, as training data (JSONL).", metavar="DATA.jsonl")
    samples: int = key(1, "Answers per prompt; more than one needs a temperature.", low=1, high=LARGEST, metavar="N")
    temperature: float = key(0.0, "0 is greedy.", low=0, high=HOTTEST, metavar="T")
    top_k: int = key(0, "0 keeps the whole vocabulary.", low=0, high=LARGEST, metavar="K")
    top_p: float = key(1.0, "1 keeps everything.", above=0, high=1, metavar="P")
    chat: bool = key(False, "Put each prompt into the chat template; else it is continued as it is.")
    max_new_tokens: int = key(
        ANSWER_TOKENS, "An answer without an end within so many tokens is dropped (see --keep-unfinished).", low=1,
        high=LARGEST, metavar="N",
    )
    stop: TEXTS = key((), "An answer also ends before this text. Repeat for more.", metavar="TEXT")
    keep_unfinished: bool = key(
        False, "Keep answers without an end too, as a base model writes them: they are trained without one."
    )
    seed: int = key(0, "Equal seeds give equal answers.", low=0, high=LARGEST)
    batch: int = key(16, "Answers that are written at the same time.", low=1, high=LARGEST, metavar="N")
    device: str = key("auto", "auto, cpu, cuda, cuda:1 ...", metavar="NAME")
    dtype: str | None = key(
        None, "float32, bfloat16, float16. Default: float32 on the CPU, else as stored.", metavar="NAME"
    )
    kernels: str = key("auto", "What computes the token mixers: triton, torch, reference, or auto.", metavar="NAME")
    resume: bool = key(False, "Continue an interrupted run; give the same arguments again.")
    overwrite: bool = key(False, "Replace DATA.jsonl, if it is of this command, once the new answers are complete.")

    def __post_init__(self) -> None:
        types = field_types(AnswerArguments)
        for item in fields(self):
            value = read_value(item.name, getattr(self, item.name), types[item.name], item.metadata)
            object.__setattr__(self, item.name, value)
        if self.samples > 1 and not self.temperature:
            raise UsageError(f"samples is {self.samples}, all equal at temperature 0; give a temperature, or 1 sample")
        if self.out.suffix not in (".jsonl", ".ndjson"):
            raise UsageError(f"out is {self.out}; give a name that ends in .jsonl, so that it is read as data")

    def check_apart(self, outputs: list[Path], source: Path) -> None:
        """Raise `UsageError` if an output is, or lies in, what is read."""
        check_apart(outputs, [Path(self.source), source, self.prompts])
