"""`flarec convert`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import fields
from typing import Any

import click

from ..base.fields import option_name
from ..train.arguments import Arguments
from .options import field_options

ELSEWHERE = {"source", "debug"}
"""Fields that are no options of this command: its argument, and what every command has."""
OPTIONS = [item for item in fields(Arguments) if item.name not in ELSEWHERE]


@click.command("convert")
@click.argument("source")
@field_options(Arguments, *(item.name for item in OPTIONS))
@click.option("--dry-run", is_flag=True, help="Say what would run, and what memory and time it needs; writes nothing.")
@click.pass_context
def command(ctx: click.Context, /, dry_run: bool, **arguments: Any) -> None:
    """Train SOURCE, a hybrid-attention causal language model (directory or hub id), into a dual-mode checkpoint."""
    # imported here so that `flarec convert --help` stays quick
    from ..train.convert import Interrupted, run
    from ..train.options import Options
    from ..train.plan import plan
    from ..train.progress import ConsoleReporter
    from . import DEBUG

    options = Options(**arguments, debug=bool(ctx.meta.get(DEBUG)))
    reporter = ConsoleReporter()
    if dry_run:
        click.echo(plan(options, reporter).text())
        return
    try:
        run(options, reporter)
    except Interrupted as stop:
        click.echo(f"Interrupted: step {stop.step} is saved. Continue with\n  {resume_command(options)}", err=True)
        sys.exit(stop.exit_code)


def resume_command(arguments: Arguments) -> str:
    """The command line that continues a run which was started with these arguments."""
    words = ["flarec", "convert", arguments.source]
    for item in OPTIONS:
        value = True if item.name == "resume" else getattr(arguments, item.name)
        if value == item.default:
            continue
        if isinstance(value, bool):
            words.append(option_name(item))
        else:
            for part in value if isinstance(value, tuple) else (value,):
                words += [option_name(item), str(part)]
    return shlex.join(words)
