"""`flarec convert`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from .options import kernels_option, plugin_options


@click.command("convert")
@click.argument("source")
@click.option(
    "--data", multiple=True, metavar="PATH[:WEIGHT]",
    help="Training data: a JSONL or Parquet file or a datasets directory with messages, prompt and response, or text. "
    "Repeat to mix several by weight.",
)
@click.option(
    "--recipe", default="flare", show_default=True, metavar="NAME|FILE", help="A built-in recipe or a TOML file."
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR",
    help="Directory of the checkpoint.  [default: the name of SOURCE with -flarec]",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change a recipe key, for example diffusion.block_size=8. Repeat for more.",
)
@click.option("--steps", type=int, help="Optimizer steps (optimizer.steps).")
@click.option("--max-length", type=int, help="Tokens per packed row (data.max_length).")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to train.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of data order and noise.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run; give the same arguments again.")
@click.option("--overwrite", is_flag=True, help="Replace DIR once the new checkpoint is complete.")
@click.option("--skip-bad-lines", is_flag=True, help="Skip and count records that cannot be used.")
@click.option(
    "--eval-data", multiple=True, metavar="PATH",
    help="Documents to evaluate on.  [default: some are held out of the training data]",
)
@click.option(
    "--max-shard-size", default="50GB", show_default=True, metavar="SIZE",
    help="Split weights that are larger into several files, for example 5GB.",
)
@kernels_option("auto")
@plugin_options
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
        click.echo(f"Interrupted: step {stop.step} is saved. Continue with\n  {resume_command(arguments)}", err=True)
        sys.exit(130)


def resume_command(arguments: dict[str, Any]) -> str:
    """The command line that continues a run which was started with these arguments."""
    words = ["flarec", "convert", str(arguments["source"])]
    for parameter in command.params:
        value = True if parameter.name == "resume" else arguments.get(str(parameter.name))
        if not isinstance(parameter, click.Option) or value in (None, False, ()) or value == parameter.default:
            continue
        if parameter.is_flag:
            words.append(parameter.opts[0])
        else:
            for item in value if isinstance(value, tuple) else (value,):
                words += [parameter.opts[0], str(item)]
    return shlex.join(words)
