"""Evaluation on held-out records: loss of the clean stream, exact-match accuracy, tokens per forward.

Records are those of training (`messages`, `prompt` and `response`, or `text`). A record that also says what is right
counts for accuracy: with `answer` and `pattern`, the last match of the pattern's first group in the generated text must
equal the answer; with `tests`, the text's Python code must run, and they after it (`flarec.evaluation.grading`).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from .api import Model, Output
from .base.fields import whole_number
from .base.generation import GenerationKeywords, GenerationOptions, merged, takes_options
from .base.json_records import Record, Where
from .base.messages import from_json
from .base.rendering import check_options
from .checkpoint.directory import describe_source
from .checkpoint.write import versions
from .errors import DataError, FlarecWarning, UsageError
from .evaluation.grading import PythonQuestion, Question, question_of
from .evaluation.record import hash_of_data
from .evaluation.scoring import score
from .evaluation.summary import Attempt, summarise
from .train.data.files import BadRecord, read_records
from .train.data.sources import RecordEncoder

THINKING = "enable_thinking"
"""The variable by which chat templates switch reasoning."""


@dataclass(frozen=True)
class Example:
    """One record, tokenised. responses = spans [start, end) of ids; prompt = ids before the last response, or empty."""

    ids: list[int]
    responses: tuple[tuple[int, int], ...]
    prompt: list[int]
    question: Question | None = None


def read_examples(
    path: str | Path, model: Model, *, limit: int | None = None, thinking: bool | None = None
) -> list[Example]:
    """The first `limit` records of a data file. thinking: the template's `enable_thinking` for chats that do not state
    it; None: the template's default. Raises `DataError` naming file and line, `UsageError` for a template that does not
    know it. Warns where no record is a chat."""
    return list(_examples(read_records(Path(path)), model, str(path), limit, thinking))


def to_examples(
    records: Iterable[Mapping[str, Any]], model: Model, *, limit: int | None = None, thinking: bool | None = None
) -> list[Example]:
    """Records that are in memory already, as `read_examples`. Raises `DataError` naming the record's number."""
    numbered = ((Where("records", "line", number), dict(record)) for number, record in enumerate(records, 1))
    return list(_examples(numbered, model, "records", limit, thinking))


def _examples(
    records: Iterable[Record], model: Model, where: str, limit: int | None, thinking: bool | None
) -> Iterator[Example]:
    option = "--thinking" if thinking else "--no-thinking"
    if thinking is not None and THINKING not in (model.tokenizer.chat_template or ""):
        there = f"the chat template does not read {THINKING}"
        if not model.tokenizer.chat_template:
            there = "the tokenizer has no chat template"
        raise UsageError(f"{there}, so that thinking cannot be switched; leave {option} out")
    encode = RecordEncoder(model.tokenizer, model.eos_ids, Path(where))
    count, chats = 0, False
    for place, record in records:
        if limit is not None and count >= limit:
            break
        try:
            if isinstance(record, BadRecord):
                raise record
            if thinking is not None:
                stated = check_options(from_json(record.get("chat_template_kwargs")))
                record = {**record, "chat_template_kwargs": {THINKING: thinking, **stated}}
            ids, found = encode(record)
            spans = tuple((max(start, 1), end) for start, end in found if end > max(start, 1))
            if not spans:
                raise BadRecord("has no response")
            prompt = [] if encode.format == "text" else ids[: spans[-1][0]]
            chats |= encode.of_chat
            yield Example(ids, spans, prompt, question_of(record))
        except BadRecord as error:
            raise DataError(f"{place}: {error}; fix the line") from None
        count += 1
    if not count:
        raise DataError(f"{where}: no records; give a file with data")
    if thinking is not None and not chats:
        warnings.warn(
            f"{option} does nothing: none of these records of {where} is a chat, and texts have no template",
            FlarecWarning, stacklevel=2,
        )


@takes_options
def evaluate(
    model: Model,
    examples: Sequence[Example],
    options: GenerationOptions | None = None,
    *,
    batch: int = 8,
    samples: int = 1,
    execute: bool = False,
    on_output: Callable[[int, Output], None] | None = None,
    **keywords: Unpack[GenerationKeywords],
) -> dict[str, Any]:
    """Loss over all responses, then `samples` generations for every example with a prompt.

    options, keywords  see `GenerationOptions`; sample n of a prompt has the seed n higher
    batch              prompts that run at the same time
    execute            run answers that are graded by tests: it is code that a model wrote (`python_answers`)
    on_output          called with (index of the example, output)

    Returns plain values: mode, records, samples, loss (nats per response token), response_tokens, too_long (prompts
    that fill the context, left out), and, over the generated answers, generated, new_tokens, forwards,
    tokens_per_forward, stop_reasons, seconds, answers (that are graded), correct, accuracy, accuracy_interval (95 %),
    pass_at ({"k": probability}), loop_free (the speed of answers that do not run in circles), and, where a recheck took
    tokens back, taken_back. None where there are no such answers. Raises `UsageError` for arguments that make no sense.
    """
    options = merged(options, keywords)
    return assess(model, examples, options, batch=batch, samples=samples, execute=execute, on_output=on_output)[0]


def assess(
    model: Model,
    examples: Sequence[Example],
    options: GenerationOptions,
    *,
    batch: int = 8,
    samples: int = 1,
    execute: bool = False,
    on_output: Callable[[int, Output], None] | None = None,
) -> tuple[dict[str, Any], list[Attempt]]:
    """`evaluate`, and the single answers behind it, ordered by example and sample."""
    batch = whole_number("batch", batch, UsageError, low=1)
    samples = whole_number("samples", samples, UsageError, low=1)
    options = model.complete(options)
    check_samples(samples, options.temperature)
    untested = sum(isinstance(example.question, PythonQuestion) for example in examples)
    if untested and not execute:
        warnings.warn(
            f"{untested} records have tests, which run code that the model writes; give --execute to grade them",
            FlarecWarning,
            stacklevel=3,
        )
    total, tokens = response_loss(model, examples, batch)
    attempts = answered(
        model, examples, options, batch=batch, samples=samples, execute=execute, on_output=on_output
    )
    result = {
        "mode": options.mode,
        "records": len(examples),
        "samples": samples,
        "loss": total / tokens if tokens else None,
        "response_tokens": tokens,
        "too_long": sum(len(example.prompt) >= model.engine.max_positions for example in examples),
        **summarise(attempts, samples),
    }
    return result, attempts


def check_samples(samples: int, temperature: float) -> None:
    """Raise `UsageError` for several answers that would all be the same."""
    if samples > 1 and temperature == 0:
        raise UsageError(f"{samples} samples at temperature 0 are {samples} times the same answer; give a temperature")


def answered(
    model: Model,
    examples: Sequence[Example],
    options: GenerationOptions,
    *,
    batch: int = 8,
    samples: int = 1,
    execute: bool = False,
    on_output: Callable[[int, Output], None] | None = None,
) -> list[Attempt]:
    """The single answers to examples with a prompt, graded; `evaluate` says what the arguments are."""
    room = model.engine.max_positions
    asked = [
        (index, sample)
        for index, example in enumerate(examples)
        if 0 < len(example.prompt) < room
        for sample in range(samples)
    ]

    def ended(place: int, output: Output) -> None:
        if on_output is not None:
            on_output(asked[place][0], output)

    outputs = model.generate_ids(
        [examples[index].prompt for index, _ in asked],
        [replace(options, seed=options.seed + sample) for _, sample in asked],
        batch=batch, on_output=ended,
    )
    attempts = []
    for (index, sample), output in zip(asked, outputs, strict=True):
        question = examples[index].question
        graded = question is not None and (execute or not isinstance(question, PythonQuestion))
        attempts.append(Attempt(
            index, sample, options.seed + sample, output.text, tuple(output.token_ids), output.forwards,
            output.stop_reason, output.seconds, question.grade(output.text) if graded and question else None,
            tuple(output.origins), output.taken_back,
        ))
    return attempts


def response_loss(model: Model, examples: Sequence[Example], batch: int = 8) -> tuple[float, int]:
    """(sum of the negative log-likelihoods in nats, number) of all response tokens, from the clean stream.

    Documents are cut at the model's context. The mask token's logit is minus infinity, as in training.
    """
    room = model.engine.max_positions
    documents = [(example.ids[:room], example.responses) for example in examples]
    scores = score(model.decode_program, documents, batch, suppress=model.engine.suppress)
    total = -sum(float(found.log_probs.sum()) for found in scores)
    return total, sum(len(found.log_probs) for found in scores)


def identity(model: Model, path: str, data: str | Path) -> dict[str, Any]:
    """What an evaluation was made with: model and data by name and hash, template, device and versions."""
    source = describe_source(path)
    manifest = model.manifest
    return {
        "model": {
            "name": source.name, "sha256": source.sha256,
            "adapter": manifest.adapter is not None if manifest else False,
            "manifest": hashlib.sha256(manifest.to_json().encode()).hexdigest() if manifest else None,
        },
        "data": {"name": Path(data).name, "sha256": hash_of_data(Path(data))},
        "chat_template": hashlib.sha256(str(model.tokenizer.chat_template).encode()).hexdigest(),
        "computed_in": {
            "device": str(model.decode_program.device), "kernels": model.kernels,
            "dtype": str(next(iter(model.program.parameters().values())).dtype).removeprefix("torch."),
        },
        "versions": versions(),
    }
