"""`flarec answers`: the source answers prompts, and what it says becomes its own training data.

An answer depends on its prompt, the seed and the number of the sample; those that run beside it only change rounding.
A run that goes on puts the same ones together as one that was not interrupted: its file is the same, byte for byte.
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...base.generation import GenerationOptions
from ...base.hashes import sha256_of
from ...base.interrupts import Interrupts
from ...base.lock import only_writer
from ...checkpoint.directory import Checkpoint, context_of, describe_source, open_checkpoint
from ...checkpoint.location import resolve
from ...checkpoint.lowered import lowered
from ...decode import Engine, Generation, TextStream
from ...decode.text import cut
from ...decode.tokenizing import ByteFallback, decode_tokens
from ...device import resolve_kernels, torch_device, torch_dtype
from ...errors import TrainingError
from ...frontend.export import capture
from ..data.files import BadRecord
from ..data.generated import KEY, USED
from ..data.sources import RecordEncoder
from ..progress import Reporter
from .arguments import AnswerArguments
from .log import AnswerLog, Progress
from .questions import Question, batches, read_questions

ROUNDS = 4
"""Answers between two saves, in batches: where an answer ends early, the next one takes its place."""


class AnswersInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: what was begun is finished; `done` of `total` answers are kept.

    exit_code: what a shell reports for a process that such a signal ended.
    """

    def __init__(self, path: Path, done: int, total: int, number: int = signal.SIGINT) -> None:
        super().__init__(f"{done} of {total} answers are kept in {path}; continue with --resume")
        self.done, self.total = done, total
        self.exit_code = 128 + number


def write_answers(arguments: AnswerArguments, reporter: Reporter) -> Progress:
    """Write `arguments.out`. Returns what the record of the file says.

    Raises `UsageError` and its kin for bad input, before anything is written; `AnswersInterrupted` after Ctrl-C. A run
    that stopped continues with `resume=True`.
    """
    log = AnswerLog(arguments.out)
    arguments.check_apart(log.paths, resolve(arguments.source))
    log.check(resume=arguments.resume, overwrite=arguments.overwrite)
    checkpoint = open_checkpoint(arguments.source)
    tokenizer = checkpoint.load_tokenizer()
    checkpoint.load_model(device="meta")  # the configuration and the family, without weights
    checkpoint.check_weights()
    count = sum(1 for _ in read_questions(arguments.prompts, tokenizer, chat=arguments.chat))
    reporter.note(f"prompts: {count:,}, {arguments.samples} each")
    identity = identity_of(arguments)
    with only_writer(arguments.out):
        log.check(resume=arguments.resume, overwrite=arguments.overwrite)  # again: nobody else comes in between now
        progress = log.begin(identity, count * arguments.samples, resume=arguments.resume)
        if progress.sha256 is None:
            if progress.done:
                reporter.note(f"continuing after {progress.done:,} of {progress.total:,} answers")
            progress = _Writer(arguments, checkpoint, tokenizer, reporter).write(log, progress)
            progress = log.finish(progress)
    reporter.note(summary(arguments, progress))
    return progress


def identity_of(arguments: AnswerArguments) -> dict[str, Any]:
    """What decides the bytes of the file."""
    source = describe_source(arguments.source)
    device = torch_device(arguments.device)
    values = asdict(arguments)
    # records of runs that dropped such answers do not name the option
    for name in ("out", "resume", "overwrite", *([] if arguments.keep_unfinished else ["keep_unfinished"])):
        del values[name]
    return {
        **values,
        "stop": list(arguments.stop),  # as the record holds it
        "source": {"name": source.name, "sha256": source.sha256},
        "prompts": {"name": arguments.prompts.name, "sha256": sha256_of(arguments.prompts)},
        "device": device.type,
        "dtype": str(_dtype(arguments, device) or "as stored"),
        "kernels": resolve_kernels(arguments.kernels, device),
    }


def _dtype(arguments: AnswerArguments, place: torch.device) -> torch.dtype | None:
    """What the model computes in; None is as stored."""
    return torch_dtype(arguments.dtype) or (torch.float32 if place.type == "cpu" else None)


def summary(arguments: AnswerArguments, progress: Progress) -> str:
    """What became of the answers, in one line."""
    counts = Counter(progress.counts)
    text = f"{arguments.out}: {counts['written']:,} answers, {counts['tokens']:,} tokens"
    text += f" (ended by the model {counts['eos']:,}, by a stop text {counts['stop']:,})"
    if counts["unfinished"]:
        text += f"; {counts['unfinished']:,} of them without an end in {arguments.max_new_tokens:,} tokens"
    reasons = {
        "truncated": f"without an end in {arguments.max_new_tokens:,} tokens",
        "too_long": "prompts that fill the model's context",
        "unusable": "empty, or nothing that a data file can hold",
    }
    dropped = [f"{counts[name]:,} {words}" for name, words in reasons.items() if counts[name]]
    text += f"; dropped: {', '.join(dropped)}" if dropped else ""
    if counts["other_tokens"]:
        text += f"; {counts['other_tokens']:,} would be other tokens if only their text were read"
    if counts["without_ids"]:
        text += f"; {counts['without_ids']:,} without their token ids (the stop text begins inside of a token)"
    return text


@dataclass
class _Writer:
    """The model, ready to answer."""

    arguments: AnswerArguments
    checkpoint: Checkpoint
    tokenizer: Any
    reporter: Reporter

    def __post_init__(self) -> None:
        place = torch_device(self.arguments.device)
        self.reporter.note(f"loading {self.arguments.source} on {place}")
        model = self.checkpoint.load_model(_dtype(self.arguments, place), place)
        program = capture(model, cache=True)
        program.extra.update(self.checkpoint.load_extra(program.dtype, place))
        kernels = resolve_kernels(self.arguments.kernels, place)
        manifest = self.checkpoint.manifest
        masks = [manifest.mask.token_id] if manifest is not None and manifest.mask.kind == "row" else []
        self.eos_ids = self.checkpoint.eos_ids(program.config, self.tokenizer)
        self.engine = Engine(
            lowered(self.checkpoint, program, "decode", kernels=kernels),
            mask_token_id=None,
            block_size=None,
            readouts={},
            eos_ids=self.eos_ids,
            max_positions=context_of(program.config, self.tokenizer),
            suppress=masks,
        )
        self.settled = ByteFallback(self.tokenizer).settled
        self.encode = RecordEncoder(self.tokenizer, self.eos_ids, self.arguments.out)

    def write(self, log: AnswerLog, progress: Progress) -> Progress:
        """All answers that are not done yet, a save after every few batches of them."""
        arguments, reporter = self.arguments, self.reporter
        questions = read_questions(arguments.prompts, self.tokenizer, chat=arguments.chat)
        with Interrupts(finish_step=True) as interrupts, reporter:
            for batch in batches(questions, arguments.samples, ROUNDS * arguments.batch, progress.done):
                counts = Counter(progress.counts)
                text = "".join(self._answered(batch, counts))
                size = progress.bytes + len(text.encode())
                progress = replace(progress, done=progress.done + len(batch), bytes=size, counts=dict(counts))
                log.append(text, progress)
                reporter.answers(progress.done, progress.total, f"{counts['written']:,} kept")
                if interrupts.requested and progress.done < progress.total:
                    raise AnswersInterrupted(log.part, progress.done, progress.total, interrupts.signal)
        if not progress.counts.get("written"):
            raise TrainingError(
                f"none of {progress.total:,} answers can be used ({summary(arguments, progress)}); raise "
                "--max-new-tokens, give a --stop text or --keep-unfinished, and start again with --overwrite"
            )
        return progress

    def _answered(self, batch: Sequence[tuple[Question, int]], counts: Counter[str]) -> list[str]:
        """The lines of the answers between two saves."""
        room = self.engine.max_positions
        asked = [(question, sample) for question, sample in batch if len(question.ids) < room]
        counts["too_long"] += len(batch) - len(asked)
        if not asked:
            return []
        arguments, stops = self.arguments, self.arguments.stop
        shared = GenerationOptions(
            mode="causal", max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
            top_k=arguments.top_k, top_p=arguments.top_p, stop=stops,
        )
        texts = [TextStream(self._decode, stops, self.settled) for _ in asked]
        made = self.engine.generate(
            [question.ids for question, _ in asked],
            [replace(shared, seed=question.seed(arguments.seed, sample)) for question, sample in asked],
            stop_check=[text.stop_check for text in texts] if stops else None,
            batch=arguments.batch,
        )
        lines = (self._line(*pair, answer, counts) for pair, answer in zip(asked, made, strict=True))
        return [line for line in lines if line]

    def _line(self, question: Question, sample: int, made: Generation, counts: Counter[str]) -> str:
        """The record of an answer as a line, empty if it is dropped."""
        unfinished = made.stop_reason == "length"
        if unfinished and not self.arguments.keep_unfinished:
            counts["truncated"] += 1
            return ""
        answer = cut(self._decode(made.token_ids), self.arguments.stop)
        record = question.record(answer)
        try:
            if not answer.strip():
                raise BadRecord("the answer is empty")
            text = self.encode(record)
            if not text[1]:
                raise BadRecord("has no response")
            field = self._generated(record, question, made, answer)
            if unfinished and field is None:
                raise BadRecord("read as text, it would end where it was cut")
            if field is not None:
                written, read = self.encode({**record, KEY: field})[0], text[0]
                counts["other_tokens"] += written != (read[: len(written)] if unfinished else read)
        except BadRecord:
            counts["unusable"] += 1
            return ""
        counts["without_ids"] += field is None
        counts.update({"written": 1, "tokens": made.new_tokens, "unfinished" if unfinished else made.stop_reason: 1})
        record |= {"line": question.line, "sample": sample, "tokens": made.new_tokens, "stop_reason": made.stop_reason}
        return json.dumps(record | ({KEY: field} if field else {}), ensure_ascii=False) + "\n"

    def _generated(
        self, record: Mapping[str, Any], question: Question, made: Generation, answer: str
    ) -> dict[str, Any] | None:
        """What a record says of the ids of its answer, those before a stop text; None if that begins inside of a token,
        or if reading the record would not use them."""
        ids = list(made.token_ids)
        while (text := self._decode(ids)) != answer:
            if len(text) < len(answer):
                return None
            ids.pop()
        unfinished, reader = made.stop_reason == "length", self.encode
        field = reader.generated.field(question.ids, ids, unfinished=unfinished)
        before = reader.notes[USED]
        reader({**record, KEY: field})
        return field if reader.notes[USED] > before else None

    def _decode(self, tokens: Sequence[int]) -> str:
        return decode_tokens(self.tokenizer, tokens)
