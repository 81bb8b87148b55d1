"""A cheap proxy for a conversion: a few steps of plain fine-tuning (the clean stream alone) on each mix of data.

Every mix starts from the same weights, takes the same number of steps from the same seed, and is measured on one split
that no mix is trained on: the loss per response token, and the share of tasks that are answered right.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..base.generation import GenerationOptions
from ..checkpoint.location import resolve
from ..decode.tokenizing import decode_tokens
from ..errors import TrainingError, UsageError
from ..evaluate import Example, read_examples
from ..evaluation.grading import PatternQuestion
from ..evaluation.scoring import score
from ..train.convert import run as convert
from ..train.data.packing import RowStream
from ..train.data.sources import TokenSource
from ..train.loop import Trainer
from ..train.prepare import prepare
from ..train.progress import Reporter
from ..train.ranks.launch import Launch
from .arguments import ScreenArguments
from .mixes import Mix, conversion, parsed_mixes, proxy

SOURCE = "(source)"
"""Name of the row of the source itself, before any step."""


@dataclass(frozen=True)
class MixScore:
    """Of one mix on the split.

    losses    mean loss per response token of every document, in nats
    loss      over all response tokens
    accuracy  share of `tasks` whose answer is right, None without tasks
    trained   tokens that were trained on; documents: of the mix
    """

    name: str
    loss: float
    losses: tuple[float, ...]
    accuracy: float | None
    tasks: int
    documents: int
    trained: int
    seconds: float


@dataclass(frozen=True)
class Screening:
    """The mixes, best first, and what they were measured on. lead: (mean, standard error) of the difference between the
    losses of the second and the best, over documents; no error of a single document. whole: whether the split has as
    many documents as were asked for."""

    source: MixScore
    ranked: tuple[MixScore, ...]
    by: str
    split: str
    steps: int
    seed: int
    lr: float
    lead: tuple[float, float | None]
    whole: bool = True
    checkpoint: Path | None = None

    @property
    def best(self) -> str:
        return self.ranked[0].name

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `flarec screen --json` prints them."""

        def row(measured: MixScore) -> dict[str, Any]:
            return {name: value for name, value in asdict(measured).items() if name != "losses"}

        return {
            "best": self.best, "by": self.by, "split": self.split, "steps": self.steps, "seed": self.seed,
            "lr": self.lr, "lead": {"mean": self.lead[0], "standard_error": self.lead[1]},
            "source": row(self.source), "mixes": [row(measured) for measured in self.ranked],
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
        }


def screen(arguments: ScreenArguments, reporter: Reporter) -> Screening:
    """Train on each mix for a few steps, measure, rank; then convert with the best if asked.

    Raises `UsageError` and its kin for bad input before anything is trained, `TrainingError` naming the mix.
    """
    mixes = parsed_mixes(arguments)
    launch = Launch.of_environment()
    if launch is not None and launch.size > 1:
        raise UsageError("flarec screen is one process; start it without torchrun (the conversion may have several)")
    if arguments.convert is not None:
        conversion(arguments, mixes[0]).check_output(resolve(arguments.source))
    with tempfile.TemporaryDirectory() as place:
        screening = _Screen(arguments, mixes, Path(place), reporter).result()
    if arguments.convert is None:
        return screening
    best = next(mix for mix in mixes if mix.name == screening.best)
    reporter.note(f"converting with mix {best.name}")
    return replace(screening, checkpoint=convert(conversion(arguments, best), reporter))


class _Screen:
    """The prepared model, the split, and what every mix starts from."""

    def __init__(self, arguments: ScreenArguments, mixes: Sequence[Mix], place: Path, reporter: Reporter) -> None:
        self.arguments, self.mixes, self.reporter = arguments, mixes, reporter
        specs = {spec.path.resolve(): spec for mix in mixes for spec in mix.specs}
        files = [spec.path for spec in specs.values()]
        run = prepare(proxy(arguments, files, place), reporter)
        if run.held_out is None:
            raise UsageError("there are too few documents to hold any out; name others with --eval-data")
        self.recipe, self.mask, self.tokenizer, self.held_out = run.recipe, run.mask, run.tokenizer, run.held_out
        self.examples = self._examples()
        self.sources: dict[Path, TokenSource] = {
            path: self._apart(source) for path, source in zip(specs, run.sources, strict=True)
        }
        self.split = self._describe_split()
        self.program = run.trainer.program
        masters = run.trainer.weights.masters
        self.start: dict[str, Tensor] = {name: value.detach().cpu().clone() for name, value in masters.items()}

    def _examples(self) -> list[Example]:
        held_out, limit = self.held_out, self.arguments.held_out
        if not self.arguments.eval_data:
            return [Example(document.ids.tolist(), document.responses, []) for document in held_out.documents]
        reader = cast(Any, SimpleNamespace(tokenizer=self.tokenizer, eos_ids=held_out.eos_ids))
        found: list[Example] = []
        for path in self.arguments.eval_data:
            found += read_examples(path, reader, limit=limit - len(found)) if len(found) < limit else []
        return found

    def _apart(self, source: TokenSource) -> TokenSource:
        """Without documents that are in the split, which other files may hold too."""
        limit = self.recipe.data.max_length
        split = {tuple(example.ids[:limit]) for example in self.examples}
        keep = [index for index in range(len(source)) if tuple(source.document(index).ids.tolist()) not in split]
        if len(keep) < len(source):
            what = f"{len(source) - len(keep):,} documents are in the split too"
            self.reporter.note(f"{source.stats.source}: {what} and left out of every mix")
        if not keep:
            raise UsageError(f"{source.stats.source} holds nothing but documents of the split; give other --eval-data")
        return source.subset(np.array(keep, dtype=np.int64))

    def _describe_split(self) -> str:
        tasks = sum(isinstance(example.question, PatternQuestion) for example in self.examples)
        if self.arguments.by == "accuracy" and not tasks:
            raise UsageError("--by accuracy: no record of --eval-data has answer and pattern")
        files = ", ".join(Path(path).name for path in self.arguments.eval_data)
        where = f"of {files}" if files else "taken out of every mix"
        return f"{len(self.examples)} documents {where} ({tasks} tasks)"

    @property
    def _whole(self) -> bool:
        return len(self.examples) >= self.arguments.held_out

    def _missing(self) -> str:
        """What to say of a split that is smaller than it was to be."""
        why = "--eval-data has no more" if self.arguments.eval_data else "every file keeps at least half of its own"
        return f"--held-out {self.arguments.held_out} is more than there is to measure on: {why}"

    def result(self) -> Screening:
        arguments = self.arguments
        self.reporter.note(f"split: {self.split}")
        if not self._whole:
            self.reporter.warn(self._missing())
        source = self._measure(SOURCE, 0, 0, time.perf_counter())
        found = [self._train(mix) for mix in self.mixes]
        if arguments.by == "accuracy":
            found.sort(key=lambda measured: (-(measured.accuracy or 0.0), measured.loss))
        else:
            found.sort(key=lambda measured: measured.loss)
        ahead = [b - a for a, b in zip(found[0].losses, found[1].losses, strict=True)]
        lead = fmean(ahead), stdev(ahead) / math.sqrt(len(ahead)) if len(ahead) > 1 else None
        lr = self.recipe.optimizer.lr
        return Screening(
            source, tuple(found), arguments.by, self.split, arguments.steps, arguments.seed, lr, lead,
            whole=self._whole,
        )

    def _train(self, mix: Mix) -> MixScore:
        """The steps of one mix, from the start."""
        recipe, begun = self.recipe, time.perf_counter()
        sources = [replace(self.sources[spec.path.resolve()], weight=spec.weight) for spec in mix.specs]
        rows = RowStream(
            sources, max_length=recipe.data.max_length, seed=self.arguments.seed, lookahead=recipe.data.lookahead
        )
        trainer = self._trainer(rows)
        self.reporter.working(f"mix {mix.name}", 0, recipe.optimizer.steps)
        tokens = 0
        for _ in range(recipe.optimizer.steps):
            step = trainer.advance()
            try:
                line = step.read(self.tokenizer)
            except TrainingError as error:
                raise TrainingError(f"mix {mix.name}: {error}") from None
            tokens += line["clean_tokens"]
            text = f"mix {mix.name}, AR loss {line['ar_loss']:.3f}"
            self.reporter.working(text, trainer.step, recipe.optimizer.steps)
        return self._measure(mix.name, sum(map(len, sources)), tokens, begun)

    @torch.no_grad()
    def _trainer(self, rows: RowStream) -> Trainer:
        parameters, exact = self.program.parameters(), dict[str, Tensor]()
        for name, value in self.start.items():
            parameters[name].copy_(value)
            if parameters[name].dtype != value.dtype:  # its master starts from the exact value
                exact[name] = value.to(self.program.device, copy=True)
        return Trainer(self.program, self.recipe, self.mask, rows, self.arguments.seed, exact)

    def _measure(self, name: str, documents: int, trained: int, begun: float) -> MixScore:
        held_out = self.held_out
        self.reporter.working(f"measuring {name}")
        engine = held_out.engine()
        cut = [(example.ids[: held_out.context], example.responses) for example in self.examples]
        scores = score(held_out.decode, cut, suppress=engine.suppress)
        sums = [(-float(found.log_probs.sum()), len(found.log_probs)) for found in scores]
        tasks = [(example.prompt, example.question) for example in self.examples]
        graded = [(prompt, question) for prompt, question in tasks if isinstance(question, PatternQuestion)]
        asked = [(prompt, question) for prompt, question in graded if 0 < len(prompt) < held_out.context]
        options = GenerationOptions(mode="causal", max_new_tokens=self.arguments.max_new_tokens)
        answers = engine.generate([prompt for prompt, _ in asked], options) if asked else []
        texts = [decode_tokens(self.tokenizer, answer.token_ids) for answer in answers]
        right = sum(question.grade(text) for (_, question), text in zip(asked, texts, strict=True))
        return MixScore(
            name=name,
            loss=sum(total for total, _ in sums) / sum(count for _, count in sums),
            losses=tuple(total / count for total, count in sums if count),
            accuracy=right / len(graded) if graded else None,
            tasks=len(graded),
            documents=documents,
            trained=trained,
            seconds=time.perf_counter() - begun,
        )
