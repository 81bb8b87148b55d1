"""The command line. Commands are imported when they run, so that `flarec --help` costs nothing.

Every command is a module of this package with a `click.Command` named `command`. All of them take `--debug`. Errors for
users end with one line on stderr and `exit_code` (2 for wrong usage, 1 for a failure); Ctrl-C ends with 130.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import warnings
from typing import Any, NoReturn

import click

from flarec import __version__
from flarec.errors import FlarecError, FlarecWarning, ToldElsewhere, first_line
from flarec.threads import manage

COMMANDS: dict[str, str] = {
    "convert": "Train a source model into a dual-mode checkpoint.",
    "finish": "Write the checkpoint of a stopped run as far as it was trained.",
    "train-head": "Teach a checkpoint how many of its drafts are safe, for elastic decoding.",
    "screen": "Compare mixes of training data by short runs.",
    "answers": "Let a source model write its own training data.",
    "generate": "Generate text with a checkpoint or a source model.",
    "chat": "Talk with a checkpoint or a source model in the terminal.",
    "serve": "Serve a checkpoint or a source model with OpenAI's protocol.",
    "eval": "Held-out loss, exact-match accuracy and tokens per forward on a data file.",
    "tune": "Measure settings of decoding on a data file, and make the best one the default.",
    "report": "One page about a checkpoint: its run, evaluations, and coloured samples.",
    "lm-eval": "Run the tasks of lm-eval on a checkpoint: its own command line.",
    "inspect": "Show a model's program, layer by layer, and what each pass changed.",
    "verify": "Check a checkpoint against the invariants of the method.",
    "bench": "Check and time the Triton kernels on a GPU.",
    "passes": "List passes and properties, those of plugins among them.",
    "recipes": "List the recipes, or document every key of one.",
    "families": "Which model families convert, and through which stages they go.",
    "doctor": "What a model needs to be converted and served, without its weights.",
}
"""Name and one-line help, in the order in which `flarec --help` lists them."""

MODULES = {"eval": "evaluate", "lm-eval": "lm_eval", "train-head": "train_head"}
"""Modules that are not named like their command."""

DEBUG = "flarec.debug"
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"flarec.cli.{MODULES.get(cmd_name, cmd_name)}")
        command = module.command
        assert isinstance(command, click.Command)
        _take_debug(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        _open_closed_outputs()
        manage()  # before any command imports torch
        try:
            return super().make_context(info_name, args, parent, **extra)
        except OSError as error:  # --help and --version are written here
            if error.errno == errno.EPIPE:
                raise
            _show(f"Error: the output cannot be written: {error.strerror}")
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        # stdout and stderr belong to the command: the libraries' own notices only confuse (set a variable to see them)
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", FlarecWarning)
                show = warnings.showwarning
                warnings.showwarning = lambda text, kind, *place, **more: (
                    click.echo(f"Warning: {text}", err=True)
                    if issubclass(kind, FlarecWarning)
                    else show(text, kind, *place, **more)
                )
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
        except ToldElsewhere as error:
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            if not other_rank():
                raise
            ctx.exit(error.exit_code)  # every rank has the same arguments, and the first one says what is wrong
        except FlarecError as error:
            if ctx.meta.get(DEBUG):
                raise
            _end(ctx, f"Error: {error}", error.exit_code)
        except OSError as error:  # of what no command expects: an output that is full, a disk that fails
            if ctx.meta.get(DEBUG) or error.errno == errno.EPIPE:  # click ends in silence when nobody reads on
                raise
            if error.errno is None:  # a library's own
                _end(ctx, f"Error: {first_line(error)}", 1)
            where = f"{error.filename} cannot be used" if error.filename else "the output cannot be written"
            _end(ctx, f"Error: {where}: {error.strerror}", 1)
        except KeyboardInterrupt:
            _end(ctx, "Interrupted.", INTERRUPTED)


def other_rank() -> bool:
    """Whether a launcher started this process as another than the first of several ranks (`flarec.train.ranks`)."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "") not in ("", "0")


def _end(ctx: click.Context, message: str, code: int) -> NoReturn:
    _show(message)
    ctx.exit(code)


def _show(message: str) -> None:
    """A last line on stderr, behind what stdout still has to say, if they can be written."""
    for stream, show in ((sys.stdout, sys.stdout.flush), (sys.stderr, lambda: click.echo(message, err=True))):
        try:
            show()
        except OSError:
            _give_up(stream)


def _give_up(stream: Any) -> None:
    """What is still to be written to a stream goes nowhere: Python would try again at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _open_closed_outputs() -> None:
    """A process may be started with closed outputs (`>&-`): Python then has none, and what is opened next would get
    their numbers."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, "w"))


def _take_debug(command: click.Command) -> None:
    """Give a command, and those of a group, the option `--debug`. The flag is kept in the context; errors then keep
    their traceback."""
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            _take_debug(inner)
    if not any(parameter.name == "debug" for parameter in command.params):
        command.params.append(
            click.Option(
                ["--debug"], is_flag=True, expose_value=False, is_eager=True, callback=_note_debug,
                help="Show the full traceback of an error.",
            )
        )


def _note_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    if value:
        ctx.meta[DEBUG] = True
    return value


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="flarec")
def main() -> None:
    """A compiler from hybrid-attention language models to dual-mode diffusion language models."""
