"""`flarec chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flarec.base.generation import MODES, GenerationOptions
from flarec.base.interrupts import Interrupts
from flarec.errors import DataError, FlarecError, GenerationError

from .loading import open_model, say_unread
from .options import adapter_option, foreign_options, generation_options, plugin_options, prefix_option, runtime_options

if TYPE_CHECKING:
    from flarec.api import Model, Output

HELP = "/mode NAME changes the mode, /stats shows numbers of the last answer and of all, /reset forgets, /quit ends"


@click.command("chat")
@click.argument("checkpoint", metavar="CKPT")
@generation_options(
    "mode", "threshold", "denoising_steps", "recheck", "drafts", "max_new_tokens", "temperature", "top_k", "top_p",
    "seed",
)
@prefix_option
@runtime_options
@foreign_options
@adapter_option
@plugin_options
def command(
    checkpoint: str, device: str, dtype: str | None, kernels: str, graphs: str, compile: str, mask_token_id: int | None,
    block_size: int | None, adapter: Path | None, plugins: tuple[str, ...], passes: tuple[str, ...], prefix_cache: int,
    **keywords: Any,
) -> None:
    """Talk with a converted checkpoint CKPT, or with any supported model that has a chat template.

    A line is a message; answers stream. /mode NAME changes the mode, /stats shows numbers of the last answer and of
    all, /reset forgets the conversation, /quit or the end of the input ends. Where the lines do not come from a
    terminal, the exit code is 1 if one of them failed.
    """
    options = GenerationOptions(**keywords)
    model = open_model(
        checkpoint, dtype=dtype, device=device, kernels=kernels, mask_token_id=mask_token_id, block_size=block_size,
        passes=passes, plugins=plugins, graphs=graphs, compile=compile, adapter=adapter,
        mode=options.mode, chat=True,
    )
    say_unread(options, str(model.complete(options).mode))
    model.engine.keep_prefixes(prefix_cache << 20)
    click.echo(HELP, err=True)
    conversation, typed = Conversation(model, options), sys.stdin.isatty()
    while (line := _line(typed)) and conversation.read(line):
        pass
    if conversation.failed and not typed:
        sys.exit(1)


def _line(typed: bool) -> bytes:
    """The next line, empty at the end of the input. typed: somebody waits for it to be asked."""
    if typed:
        click.echo("> ", nl=False, err=True)
    return sys.stdin.buffer.readline()


class Conversation:
    """Messages so far, and how the next answer is made. An answer that an error ends leaves the messages as they were.

    failed: whether any line was refused
    """

    def __init__(self, model: Model, options: GenerationOptions) -> None:
        self.model = model
        self.options = options  # as they were given: every mode has defaults of its own
        self.messages: list[dict[str, str]] = []
        self.last: Output | None = None
        self.failed = False

    def read(self, line: bytes) -> bool:
        """Do what a line says. False to end."""
        try:
            return self.take(line.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            self._refuse(DataError(f"the line is not UTF-8 text ({error}); convert it"))
        except GenerationError as error:
            self._refuse(error)
        return True

    def _refuse(self, error: FlarecError) -> None:
        self.failed = True
        click.echo(f"Error: {error}", err=True)

    def take(self, line: str) -> bool:
        """Do what a line says. False to end. Raises `GenerationError`."""
        name, _, argument = line.partition(" ")
        if line == "/quit":
            return False
        if line == "/reset":
            self.messages.clear()
            click.echo("the conversation is forgotten", err=True)
        elif line == "/stats":
            self._stats()
        elif name == "/mode":
            self._mode(argument.strip())
        elif name.startswith("/"):
            click.echo(HELP, err=True)
        elif line:
            self._answer(line)
        return True

    def _answer(self, text: str) -> None:
        asked = [*self.messages, {"role": "user", "content": text}]
        with Interrupts() as interrupts:

            def show(_: int, piece: str) -> None:
                interrupts.check()
                click.echo(piece, nl=False)

            output: Output = self.model.generate([asked], self.options, on_text=show)[0]
        click.echo()
        self.last = output
        self.messages = [*asked, {"role": "assistant", "content": output.text}]

    def _mode(self, name: str) -> None:
        if name not in MODES:
            raise GenerationError(f"unknown mode {name or 'without a name'}; choose {', '.join(MODES)}")
        options = replace(self.options, mode=name)
        self.model.complete(options)  # says whether the checkpoint has the mode
        self.options = options

    def _stats(self) -> None:
        if self.last is None:
            click.echo("no answer yet", err=True)
            return
        last = self.last
        rate = last.new_tokens / last.seconds if last.seconds else 0.0
        click.echo(
            f"{last.mode}: {last.new_tokens} tokens, {last.tokens_per_forward:.2f} per forward, {rate:.1f} tokens/s, "
            f"stopped by {last.stop_reason}", err=True,
        )
        click.echo("all answers:", err=True)
        for line in self.model.engine.stats.lines():
            click.echo(line, err=True)
