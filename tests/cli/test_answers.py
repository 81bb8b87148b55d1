"""`flarec answers`, and `flarec convert --prompts`: training data of the source's own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import flarec as package
from flarec.base.hashes import sha256_of
from flarec.checkpoint.manifest import Manifest
from flarec.cli.answers import OPTIONS, command
from flarec.cli.options import resume_command
from flarec.train.answers.arguments import AnswerArguments
from flarec.train.answers.log import AnswerLog
from flarec.train.data.sources import load_sources, parse_source
from tests.checkpoints import tree
from tests.cli.conversions import QUICK, flarec
from tests.cli.processes import Command
from tests.models import END_ID, tiny_checkpoint

WORDS = ["red", "green", "blue", "one", "two", "three", "four"]
SAMPLED = ["--samples", "2", "--temperature", "1", "--max-new-tokens", "24", "--stop", "e", "--device", "cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source/lfm2 and prompts.txt; `whole.jsonl` are its answers, 4 between two saves."""
    home = tmp_path_factory.mktemp("answers")
    tiny_checkpoint(home / "source", "lfm2", tokens=320)  # answers with few ids that are no tokens
    (home / "prompts.txt").write_text("".join(f"say {word}\n" for word in WORDS))
    result = answers(home, "whole.jsonl")
    assert result.exit_code == 0, result.output
    return home


def answers(home: Path, out: str | Path, *more: str) -> Any:
    return flarec(
        "answers", home / "source/lfm2", "--prompts", home / "prompts.txt", "--out", home / out, "--batch", "1",
        *SAMPLED, *more,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_what_the_source_says(home: Path) -> None:
    """Each alone, of the seed that its prompt and number give: not of its batch."""
    model = package.load(home / "source/lfm2")
    found = lines(home / "whole.jsonl")
    record = json.loads((home / "whole.jsonl.record.json").read_text())
    asked = {(line["line"], line["sample"]): line for line in found}
    assert len(asked) == len(found) == record["counts"]["written"] and record["done"] == 2 * len(WORDS)
    from flarec.train.answers.questions import read_questions

    truncated, kinds = 0, set()
    for question in read_questions(home / "prompts.txt", model.tokenizer, chat=False):
        for sample in (0, 1):
            seed = question.seed(0, sample)
            alone = model.generate(question.prompt, temperature=1.0, max_new_tokens=24, stop="e", seed=seed)
            line = asked.get((question.line, sample))
            truncated += alone.stop_reason == "length"
            if line is None:
                assert alone.stop_reason == "length" or not alone.text.strip()
                continue
            assert line["prompt"] == question.prompt and line["response"] == alone.text
            assert (line["stop_reason"], line["tokens"]) == (alone.stop_reason, alone.new_tokens)
            written = line["flarec_ids"]["ids"] if "flarec_ids" in line else alone.token_ids
            assert written == alone.token_ids[: len(written)]
            kinds.add((line["stop_reason"], "flarec_ids" in line))
    assert record["counts"]["truncated"] == truncated > 0
    assert record["sha256"] == sha256_of(home / "whole.jsonl")
    assert ("stop", True) in kinds and record["counts"]["other_tokens"] > 0


def test_they_are_training_data(home: Path) -> None:
    """With the ids that the model wrote, and an end where a stop text took its place."""
    tokenizer, found = package.load(home / "source/lfm2").tokenizer, lines(home / "whole.jsonl")
    (source,) = load_sources([parse_source(str(home / "whole.jsonl"))], tokenizer, max_length=64)
    assert source.stats.documents == source.stats.records == len(found)
    for number, line in enumerate(found):
        document = source.document(number)
        (start, end), = document.responses
        if "flarec_ids" in line:
            written, said = line["flarec_ids"]["ids"], document.ids[start:end].tolist()
            assert said in ([*written, tokenizer.eos_token_id], written)


def test_unfinished_answers_train_without_an_end(home: Path) -> None:
    """What is dropped else is there, up to where it was cut."""
    assert answers(home, "kept.jsonl", "--max-new-tokens", "4", "--keep-unfinished").exit_code == 0
    found, whole = lines(home / "kept.jsonl"), lines(home / "whole.jsonl")
    cut = [line for line in found if line["stop_reason"] == "length"]
    assert [line for line in found if line not in cut] == [line for line in whole if line["tokens"] <= 4]
    counts = json.loads((home / "kept.jsonl.record.json").read_text())["counts"]
    assert counts["unfinished"] == len(cut) > 0 and not counts.get("truncated")
    (source,) = load_sources(
        [parse_source(str(home / "kept.jsonl"))], package.load(home / "source/lfm2").tokenizer, max_length=64)
    for number, line in enumerate(found):
        document = source.document(number)
        ((start, end),) = document.responses
        if line in cut:
            assert document.ids[start:].tolist() == line["flarec_ids"]["ids"] and end == len(document.ids)


def test_an_interrupted_run_has_the_same_bytes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second batch is never counted; another batch size alone changes no answer."""
    from flarec.train.answers.log import AnswerLog

    append, calls = AnswerLog.append, []

    def stopping(self: AnswerLog, text: str, progress: Any) -> None:
        calls.append(text)
        if len(calls) == 2:
            self.part.write_bytes(self.part.read_bytes() + text.encode()[:-3])
            raise KeyboardInterrupt
        append(self, text, progress)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerLog, "append", stopping)
        assert answers(home, "stopped.jsonl").exit_code == 130
    assert not (home / "stopped.jsonl").exists()
    again = answers(home, "stopped.jsonl")
    assert (again.exit_code, "continue it with --resume" in again.stderr) == (2, True)
    other = answers(home, "stopped.jsonl", "--resume", "--seed", "3")
    assert (other.exit_code, "seed was 0 and is now 3" in other.stderr) == (2, True)
    result = answers(home, "stopped.jsonl", "--resume")
    assert result.exit_code == 0 and "continuing after 4 of 14 answers" in result.stderr
    assert (home / "stopped.jsonl").read_bytes() == (home / "whole.jsonl").read_bytes()
    assert answers(home, "others.jsonl", "--batch", "5").exit_code == 0
    assert (home / "others.jsonl").read_bytes() == (home / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_signals(home: Path, name: str, code: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    words = ["answers", str(home / "source/lfm2"), "--prompts", str(home / "prompts.txt"), "--out",
             str(home / f"{name}.jsonl"), "--batch", "1", *SAMPLED]

    def watch() -> None:
        append = AnswerLog.append

        def watched(self: AnswerLog, text: str, progress: Any) -> None:
            append(self, text, progress)
            if progress.done == 4:
                os.kill(os.getpid(), getattr(signal, name))

        mock.patch.object(AnswerLog, "append", watched).start()

    with Command(words, home / "errors.txt", watch) as process:
        found, errors = process.ended()
    (home / "errors.txt").unlink()
    assert found == code, errors
    if name != "SIGKILL":
        assert "Interrupted: 4 of 14 answers are kept" in errors
        words = shlex.split(errors.splitlines()[-1])[1:]
    else:
        words.append("--resume")
    assert flarec(*words).exit_code == 0
    assert (home / f"{name}.jsonl").read_bytes() == (home / "whole.jsonl").read_bytes()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--temperature", "0"], "samples is 2, all equal at temperature 0"),
        (["--samples", "0"], "samples is 0; give a whole number, at least 1"),
        (["--top-p", "0"], "top_p is 0.0; give a number, above 0"),
        (["--out", "data.txt"], "out is data.txt; give a name that ends in .jsonl"),
        (["--resume"], "there is nothing to resume"),
        (["--chat", "--prompts", "nowhere"], "nowhere: cannot be read"),
        (["--device", "no"], "device 'no' cannot be used"),
        (["--dtype", "int8"], "dtype 'int8' is unknown"),
    ],
)
def test_bad_input_writes_nothing(home: Path, more: list[str], message: str) -> None:
    before = tree(home)
    result = answers(home, "bad.jsonl", *more)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert tree(home) == before


def test_no_input_is_replaced(home: Path) -> None:
    result = flarec("answers", home / "source/lfm2", "--prompts", home / "whole.jsonl", "--out", home / "whole.jsonl",
                    "--overwrite")
    assert (result.exit_code, "is the output" in result.stderr) == (2, True), result.stderr
    inside = home / "source/lfm2/answers.jsonl"
    assert "which is read" in answers(home, inside).stderr and not inside.exists()


def test_no_answer_has_an_end(home: Path) -> None:
    result = answers(home, "none.jsonl", "--stop", "e", "--max-new-tokens", "1", "--seed", "1", "--overwrite")
    assert result.exit_code == 1 and "none of 14 answers can be used" in result.stderr
    assert not (home / "none.jsonl").exists()


def test_the_command_that_continues() -> None:
    given = AnswerArguments(source="m", prompts=Path("p q.txt"), out=Path("d.jsonl"), samples=3, temperature=0.5,
                            stop=("a", "b"), chat=True, dtype="float32")
    words = shlex.split(resume_command("answers", given, OPTIONS))
    values = command.make_context("answers", words[2:]).params
    assert values.pop("resume") is True
    assert AnswerArguments(**values) == given


def test_conversion_trains_on_the_answers(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both steps; a run that is stopped in either goes on, and answers that are there are not written again."""
    from flarec.train.answers import write
    from flarec.train.loop import Trainer

    (tmp_path / "prompts.txt").write_text("".join(f"say {word}\n" for word in WORDS * 3))
    shutil.copytree(home / "source/lfm2", tmp_path / "lfm2")
    ends = {"eos_token_id": [END_ID, *range(40, 70)]}  # a random model rarely ends otherwise
    (tmp_path / "lfm2" / "generation_config.json").write_text(json.dumps(ends))
    words = ["convert", tmp_path / "lfm2", "--prompts", tmp_path / "prompts.txt", "--samples", 2, "--temperature", 1,
             "--answer-tokens", "24", "--out", tmp_path / "out", *QUICK, "--set", "evaluation.every=0"]
    planned = flarec(*words, "--dry-run")
    assert (planned.exit_code, "out.answers.jsonl is not there yet" in planned.stderr) == (2, True), planned.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lfm2", "prompts.txt"]

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write._Writer, "_answered", interrupted)
        assert flarec(*words).exit_code == 130
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", interrupted)
        result = flarec(*words, "--resume")
        assert result.exit_code == 130, result.stderr
    data = tmp_path / "out.answers.jsonl"
    made = data.read_bytes()
    planned = flarec(*words, "--dry-run", "--overwrite")
    assert planned.exit_code == 0, planned.stderr
    with monkeypatch.context() as patch:
        patch.setattr(write._Writer, "_answered", interrupted)
        result = flarec(*words, "--resume")
    assert result.exit_code == 0, result.stderr
    assert data.read_bytes() == made
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    (source,) = manifest.data["sources"].items()
    assert source[0] == "1: out.answers.jsonl" and source[1]["documents"] == len(lines(data))
