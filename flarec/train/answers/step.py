"""The first step of `flarec convert --prompts`: the source's own answers, which the conversion then trains on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...checkpoint.location import resolve
from ...checkpoint.own import is_own
from ...errors import UsageError
from ..options import Options
from ..progress import Reporter
from .arguments import AnswerArguments
from .log import AnswerLog
from .write import AnswersInterrupted as AnswersInterrupted
from .write import identity_of, write_answers


def answers_file(options: Options) -> Path:
    """Where the answers are: beside the checkpoint, so that they outlive the run."""
    return options.output.with_name(f"{options.output.name}.answers.jsonl")


def with_answers(options: Options, reporter: Reporter, *, write: bool = True) -> Options:
    """The options with the source's answers among the data; without prompts as they are.

    Answers that are there already, complete and of the same arguments, are taken as they are. `write`: else they must
    be there. Raises as `write_answers`, and for an output that cannot be written, before anything is answered.
    """
    options.check_prompts()
    if options.prompts is None:
        return options
    out = answers_file(options)
    arguments = AnswerArguments(
        source=options.location, prompts=options.prompts, out=out, samples=options.samples,
        temperature=options.temperature, chat=options.chat, max_new_tokens=options.answer_tokens, seed=options.seed,
        device=options.device, kernels=options.kernels,
    )
    options.load_recipe()
    log, state = AnswerLog(out), options.state_directory
    arguments.check_apart(log.paths, resolve(options.location))
    progress = log.read()
    complete = progress is not None and progress.sha256 is not None and progress.identity == identity_of(arguments)
    if not complete and not write:
        raise UsageError(f"{out} is not there yet, so that nothing can be planned; write it with `flarec answers`")
    # a run that was stopped among its answers has no training state yet
    stopped = progress is not None and not state.in_use and not is_own(options.output)
    training = replace(options, resume=False) if stopped else options
    training.check_output(resolve(options.location))
    resume = complete or (options.resume and progress is not None)
    write_answers(replace(arguments, resume=resume, overwrite=options.overwrite), reporter)
    return replace(training, data=(*options.data, str(out)))
