"""`flarec train-head`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click

from ..train.horizon.arguments import HeadArguments
from .options import field_options

OPTIONS = [item.name for item in fields(HeadArguments) if item.name != "checkpoint"]


@click.command("train-head")
@click.argument("checkpoint")
@field_options(HeadArguments, *OPTIONS)
def command(**values: Any) -> None:
    """Teach CHECKPOINT how many of its drafts are safe, for `--mode elastic`.

    The weights stay as they are; a small head on the last hidden state is trained, and OUT is the checkpoint with it.
    """
    arguments = HeadArguments(**values)
    # imported here so that `flarec train-head --help` stays quick
    from ..train.horizon.run import train_head
    from ..train.progress import ConsoleReporter

    with ConsoleReporter() as reporter:
        train_head(arguments, reporter)
