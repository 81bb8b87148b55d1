"""`flarec lm-eval`: the command line of lm-eval, with flarec's model class registered."""

from __future__ import annotations

import importlib.util
import sys

import click

from flarec.errors import UsageError


@click.command(
    "lm-eval", context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS OF LM-EVAL]...")
@click.pass_context
def command(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Run lm-eval's tasks, for example with

    \b
    flarec lm-eval --model flarec --model_args path=CKPT,mode=ar-trust \\
      --include_path MY_TASKS --tasks NAME

    Everything after `lm-eval` goes to lm-eval's own command line (its --help is shown for --help where it is
    installed). Task files may hold code, which runs; files of a checkpoint never do.
    """
    if importlib.util.find_spec("lm_eval") is None:
        if arguments in (("--help",), ("-h",)):
            click.echo(ctx.get_help())
            return
        raise UsageError("lm-eval is not installed; run: pip install 'flarec[lm-eval]'")
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "flarec" not in model_registry:
        model_registry.register("flarec", target="flarec.evaluation.harness:FlarecLM")
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
