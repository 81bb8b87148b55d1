"""Evaluation on held-out records: loss of the clean stream, exact-match accuracy, tokens per forward.

Records are those of training (`messages`, `prompt` and `response`, or `text`). A record that also has `answer` and
`pattern` counts for accuracy: the last match of the pattern's first group in the generated text must equal the answer.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import regex

from .api import Model, Output
from .base.fields import shown, whole_number
from .base.generation import GenerationKeywords, GenerationOptions, merged, takes_options
from .base.json_records import Record, Where
from .errors import DataError, FlarecWarning, UsageError
from .evaluation.scoring import score
from .train.data.files import BadRecord, read_records
from .train.data.sources import RecordEncoder

PATTERN_SECONDS = 5.0
"""How long a record's pattern may take on an answer: some take years."""


@dataclass(frozen=True)
class Example:
    """One record, tokenised. responses = spans [start, end) of ids; prompt = ids before the last response, or empty."""

    ids: list[int]
    responses: tuple[tuple[int, int], ...]
    prompt: list[int]
    answer: str | None = None
    pattern: Any = None


def read_examples(path: str | Path, model: Model, *, limit: int | None = None) -> list[Example]:
    """The first `limit` records of a data file. Raises `DataError` naming file and line."""
    return list(_examples(read_records(Path(path)), model, str(path), limit))


def to_examples(records: Iterable[Mapping[str, Any]], model: Model, *, limit: int | None = None) -> list[Example]:
    """Records that are in memory already. Raises `DataError` naming the record's number."""
    numbered = ((Where("records", "line", number), dict(record)) for number, record in enumerate(records, 1))
    return list(_examples(numbered, model, "records", limit))


def _examples(
    records: Iterable[Record], model: Model, where: str, limit: int | None
) -> Iterator[Example]:
    encode = RecordEncoder(model.tokenizer, model.eos_ids, Path(where))
    count = 0
    for place, record in records:
        if limit is not None and count >= limit:
            return
        try:
            if isinstance(record, BadRecord):
                raise record
            ids, found = encode(record)
            spans = tuple((max(start, 1), end) for start, end in found if end > max(start, 1))
            if not spans:
                raise BadRecord("has no response")
            prompt = [] if encode.format == "text" else ids[: spans[-1][0]]
            yield Example(ids, spans, prompt, *_question(record))
        except BadRecord as error:
            raise DataError(f"{place}: {error}; fix the line") from None
        count += 1
    if not count:
        raise DataError(f"{where}: no records; give a file with data")


def _question(record: Mapping[str, Any]) -> tuple[str, Any] | tuple[None, None]:
    answer, pattern = record.get("answer"), record.get("pattern")
    if answer is None or pattern is None:
        return None, None
    try:
        compiled = regex.compile(str(pattern))
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise BadRecord(f"pattern {shown(pattern)} is not a regular expression ({error})") from None
    if compiled.groups < 1:
        raise BadRecord(f"pattern {shown(pattern)} has no group; put parentheses around the answer")
    return str(answer), compiled


def found_answer(pattern: Any, text: str) -> str | None:
    """The last match of the pattern's first group (`regex`), stripped; None without a match.

    A pattern that takes longer than `PATTERN_SECONDS` counts as one without a match, with a `FlarecWarning`.
    """
    try:
        found = [match[1] for match in pattern.finditer(text, timeout=PATTERN_SECONDS)]
    except TimeoutError:
        warnings.warn(
            f"the pattern {shown(pattern.pattern)} took longer than {PATTERN_SECONDS:g} s on an answer, which counts "
            "as wrong; write it without nested repetitions",
            FlarecWarning,
            stacklevel=2,
        )
        return None
    return found[-1].strip() if found and found[-1] is not None else None


@takes_options
def evaluate(
    model: Model,
    examples: Sequence[Example],
    options: GenerationOptions | None = None,
    *,
    batch: int = 8,
    on_output: Callable[[int, Output], None] | None = None,
    **keywords: Unpack[GenerationKeywords],
) -> dict[str, Any]:
    """Loss over all responses, then a generation for every example with a prompt.

    options, keywords  see `GenerationOptions`; batch = prompts that run at the same time
    on_output          called with (index of the example, output)

    Returns plain values: mode, records, loss (nats per response token), response_tokens, and, over the generated ones,
    generated, new_tokens, forwards, tokens_per_forward, stop_reasons, seconds, too_long (prompts that fill the context,
    left out), answers, correct, accuracy (None without answers).
    """
    batch = whole_number("batch", batch, UsageError, low=1)
    options = model.complete(merged(options, keywords))
    total, tokens = response_loss(model, examples, batch)
    room = model.engine.max_positions
    asked = [index for index, example in enumerate(examples) if 0 < len(example.prompt) < room]
    outputs: dict[int, Output] = {}

    def ended(place: int, output: Output) -> None:
        outputs[asked[place]] = output
        if on_output is not None:
            on_output(asked[place], output)

    model.generate_ids([examples[index].prompt for index in asked], options, batch=batch, on_output=ended)
    seconds = max((output.seconds for output in outputs.values()), default=0.0)
    new = sum(output.new_tokens for output in outputs.values())
    forwards = sum(output.forwards for output in outputs.values())
    graded = [
        found_answer(example.pattern, outputs[index].text) == example.answer.strip()
        for index, example in enumerate(examples)
        if index in outputs and example.pattern is not None and example.answer is not None
    ]
    return {
        "mode": options.mode,
        "records": len(examples),
        "loss": total / tokens if tokens else None,
        "response_tokens": tokens,
        "generated": len(outputs),
        "too_long": sum(len(example.prompt) >= room for example in examples),
        "new_tokens": new,
        "forwards": forwards,
        "tokens_per_forward": new / forwards if forwards else None,
        "stop_reasons": dict(sorted(Counter(output.stop_reason for output in outputs.values()).items())),
        "seconds": seconds,
        "answers": len(graded),
        "correct": sum(graded),
        "accuracy": sum(graded) / len(graded) if graded else None,
    }


def response_loss(model: Model, examples: Sequence[Example], batch: int = 8) -> tuple[float, int]:
    """(sum of the negative log-likelihoods in nats, number) of all response tokens, from the clean stream.

    Documents are cut at the model's context. The mask token's logit is minus infinity, as in training.
    """
    room = model.engine.max_positions
    documents = [(example.ids[:room], example.responses) for example in examples]
    scores = score(model.decode_program, documents, batch, suppress=model.engine.suppress)
    total = -sum(float(found.log_probs.sum()) for found in scores)
    return total, sum(len(found.log_probs) for found in scores)
