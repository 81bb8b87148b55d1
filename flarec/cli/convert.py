"""`flarec convert`."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any, NoReturn

import click

from ..errors import ToldElsewhere, UsageError
from ..train.arguments import Arguments
from .options import field_options, resume_command

ELSEWHERE = {"source", "debug"}
"""Fields that are no options of this command: its argument, and what every command has."""
OPTIONS = [item for item in fields(Arguments) if item.name not in ELSEWHERE]


@click.command("convert")
@click.argument("source")
@field_options(Arguments, *(item.name for item in OPTIONS))
@click.option("--dry-run", is_flag=True, help="Say what would run, and what memory and time it needs; writes nothing.")
@click.pass_context
def command(ctx: click.Context, /, dry_run: bool, **arguments: Any) -> None:
    """Train SOURCE, a hybrid-attention causal language model (directory or hub id), into a dual-mode checkpoint.

    Several GPUs: torchrun --nproc-per-node N -m flarec convert ... (docs/ranks.md).
    """
    # imported here so that `flarec convert --help` stays quick
    from ..train.answers.step import AnswersInterrupted
    from ..train.convert import Interrupted, run
    from ..train.options import Options
    from ..train.plan import plan
    from ..train.progress import ConsoleReporter
    from . import DEBUG, other_rank

    try:
        options = Options(**arguments, debug=bool(ctx.meta.get(DEBUG)))
    except UsageError as error:
        if other_rank():  # the first one says it
            raise ToldElsewhere(str(error), error.exit_code) from error
        raise
    reporter = ConsoleReporter()
    if dry_run:
        planned = plan(options, reporter)
        if planned is not None:
            click.echo(planned.text())
        return
    try:
        if run(options, reporter) != options.output:
            _stopped(f"Stopped: step {options.stop_after} is saved, as asked", options)
    except Interrupted as stop:
        _interrupted(f"step {stop.step} is saved", options, stop.exit_code)
    except AnswersInterrupted as stop:
        _interrupted(f"{stop.done} of {stop.total} answers are kept", options, stop.exit_code)


def _interrupted(kept: str, options: Arguments, code: int) -> NoReturn:
    _stopped(f"Interrupted: {kept}", options)
    sys.exit(code)


def _stopped(what: str, options: Arguments) -> None:
    click.echo(f"{what}. Continue with\n  {resume_command('convert', options, OPTIONS)}", err=True)
