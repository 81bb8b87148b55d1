"""What training data are in a model's tokens: counts, lengths, what rows cut off, what stands there twice."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flarec.checkpoint.directory import Checkpoint
from flarec.checkpoint.ends import stated_ends
from flarec.frontend.source.gguf import gguf_file, gguf_tokenizer
from flarec.frontend.trust import opened
from flarec.recipe import Recipe
from flarec.train.advice import about_repeats
from flarec.train.data.files import SourceSpec, parse_source
from flarec.train.data.sources import TokenSource, load_sources

from .report import DataReport

PARTS = {"half": 0.5, "nine in ten": 0.9, "99 in 100": 0.99}
"""Shares of the documents whose lengths are told."""
LONGEST = 3
"""Documents that are named."""


class _Seen:
    """Lengths, places and repeats of documents as they are read."""

    def __init__(self) -> None:
        self.lengths = array("q")
        self.longest: list[tuple[int, str]] = []
        self.counts: Counter[bytes] = Counter()
        self.places: dict[bytes, str] = {}

    def __call__(self, where: object, ids: Sequence[int]) -> None:
        self.lengths.append(len(ids))
        if len(self.longest) < LONGEST or len(ids) > self.longest[-1][0]:
            self.longest = sorted([*self.longest, (len(ids), str(where))], key=lambda item: -item[0])[:LONGEST]
        key = hashlib.sha256(array("q", ids).tobytes()).digest()
        self.counts[key] += 1
        if self.counts[key] == 1:
            self.places[key] = str(where)

    @property
    def repeats(self) -> int:
        """Documents that stand somewhere before, token for token."""
        return len(self.lengths) - len(self.counts)

    def most_repeated(self) -> tuple[int, str]:
        """How often the most frequent document stands there, and where first."""
        key, count = self.counts.most_common(1)[0]
        return count, self.places[key]


def examine_data(
    source: str, gguf: str | None, location: str, config: Any, texts: Sequence[str], recipe: Recipe, length: int
) -> tuple[DataReport, ...]:
    """What `flarec convert SOURCE --data ...` would find in each of `texts` (PATH[:WEIGHT]), in rows of `length`.

    location: the directory with the configuration, or the hub id; config: of the model. Bad records are counted. Raises
    `DataError` for data that cannot be read at all, `CheckpointError` for a source without a tokenizer.
    """
    specs = [parse_source(text) for text in texts]
    tokenizer, ends = _tokenizer(source, gguf, location, config)
    weights, rows = sum(spec.weight for spec in specs), recipe.optimizer.steps * recipe.optimizer.batch_rows
    vocabulary = int(config.get_text_config().vocab_size)
    found = []
    for spec in specs:
        seen = _Seen()
        (made,) = load_sources([spec], tokenizer, max_length=length, skip_bad_lines=True, end_ids=ends, seen=seen)
        epochs = rows * length * spec.weight / weights / made.stats.tokens
        found.append(_report(spec, made, seen, length, epochs, vocabulary))
    return tuple(found)


def _tokenizer(source: str, gguf: str | None, location: str, config: Any) -> tuple[Any, frozenset[int]]:
    """The tokenizer of a source, and the ids that end a text. Of a hub id no weights are fetched."""
    from transformers import AutoTokenizer

    file, path = gguf_file(source, gguf), Path(source)
    if file is not None:
        tokenizer = gguf_tokenizer(file)
    elif path.exists():
        tokenizer = Checkpoint(path.parent if path.is_file() else path, None).load_tokenizer()
    else:
        tokenizer = opened(AutoTokenizer, source)
    return tokenizer, stated_ends(Path(location), config, tokenizer)


def _report(
    spec: SourceSpec, made: TokenSource, seen: _Seen, length: int, epochs: float, vocabulary: int
) -> DataReport:
    stats, lengths = made.stats, np.array(seen.lengths)
    quantiles = np.quantile(lengths, list(PARTS.values()), method="inverted_cdf")
    count, place = seen.most_repeated()
    report = DataReport(
        source=str(spec.path), text=str(stats), documents=stats.documents, tokens=stats.tokens, targets=stats.targets,
        turns=stats.turns, truncated=stats.truncated, truncated_tokens=stats.truncated_tokens,
        lost_turns=stats.lost_turns, dropped=stats.dropped, bad_lines=stats.bad_lines,
        lengths={name: int(value) for name, value in zip(PARTS, quantiles, strict=True)}, longest=tuple(seen.longest),
        repeats=seen.repeats, most_repeated=(count, place) if count > 1 else None,
        rows=-(-stats.tokens // length), epochs=epochs,
    )
    return replace(report, advice=tuple(_advice(report, made, length, vocabulary)))


def _advice(report: DataReport, made: TokenSource, length: int, vocabulary: int) -> list[str]:
    """Lines on what to do."""
    lines = []
    if report.truncated or report.dropped:
        lost = report.truncated_tokens / (report.tokens + report.truncated_tokens)
        lines.append(
            f"rows of {length:,} tokens cut {report.truncated:,} documents ({lost:.1%} of the tokens, "
            f"{report.lost_turns:,} turns) and leave out {report.dropped:,}: --max-length {report.longest[0][0]} would "
            "cut none (flarec doctor --length says what memory that needs)"
        )
    if report.repeats:
        count, place = report.most_repeated or (1, "")
        lines.append(
            f"{report.repeats:,} documents stand there before, token for token ({place}: {count:,} times): held-out "
            "documents may be among them; remove repeats, or name others with --eval-data"
        )
    if report.bad_lines:
        lines.append(
            f"{report.bad_lines:,} records cannot be used, and a run refuses the first ({made.stats.first_bad_line}); "
            "fix them, or skip them with --skip-bad-lines"
        )
    largest = int(made.tokens.max())
    if largest >= vocabulary:
        lines.append(
            f"id {largest} is none of the model's {vocabulary:,} rows: give the tokenizer that belongs to the model"
        )
    return lines + about_repeats(Path(report.source).name, report.documents, report.epochs)
