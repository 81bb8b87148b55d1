"""`flarec finish`."""

from __future__ import annotations

from pathlib import Path

import click

from .convert import OPTIONS
from .options import resume_command


@click.command("finish")
@click.argument("partial", metavar="OUT.partial", type=click.Path(path_type=Path))
@click.option("--keep", is_flag=True, help="Keep OUT.partial: the run can go on (convert --resume --overwrite).")
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new checkpoint is complete.")
@click.option("--device", metavar="auto|cpu|cuda", help="Where to evaluate. Default: where the run trained.")
def command(partial: Path, keep: bool, overwrite: bool, device: str | None) -> None:
    """Write the checkpoint of a run that stopped, as far as it was trained: its last save becomes OUT.

    The run's arguments are read from OUT.partial; its source and data must be where they were. The manifest and the
    model card state how many steps were trained.
    """
    from ..train.convert import finish
    from ..train.progress import ConsoleReporter
    from ..train.recorded import recorded_options

    finish(partial, keep=keep, overwrite=overwrite, device=device, reporter=ConsoleReporter())
    if keep:
        options = recorded_options(partial, overwrite=True)
        done = options.state_directory.saved_step == options.load_recipe().optimizer.steps
        how = "Its last step is trained; extend it by a larger --steps in" if done else "Go on with"
        click.echo(f"{partial} is kept. {how}\n  {resume_command('convert', options, OPTIONS)}", err=True)
