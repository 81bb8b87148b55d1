"""`flarec answers`."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

import click

from ..train.answers.arguments import AnswerArguments
from .options import field_options, resume_command

OPTIONS = [item for item in fields(AnswerArguments) if item.name != "source"]


@click.command("answers")
@click.argument("source")
@field_options(AnswerArguments, *(item.name for item in OPTIONS))
def command(**values: Any) -> None:
    """Let SOURCE (directory or hub id) answer prompts, and write the answers as training data.

    Each answer depends on its prompt, the seed and its number alone. Answers without an end are dropped and counted,
    unless --keep-unfinished is given.
    """
    arguments = AnswerArguments(**values)
    # imported here so that `flarec answers --help` stays quick
    from ..train.answers.write import AnswersInterrupted, write_answers
    from ..train.progress import ConsoleReporter

    try:
        write_answers(arguments, ConsoleReporter())
    except AnswersInterrupted as stop:
        kept = f"{stop.done} of {stop.total} answers are kept"
        again = resume_command("answers", arguments, OPTIONS)
        click.echo(f"Interrupted: {kept}. Continue with\n  {again}", err=True)
        sys.exit(stop.exit_code)
