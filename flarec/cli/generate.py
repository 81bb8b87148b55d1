"""`flarec generate`: text from a checkpoint or a source model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flarec.base.generation import RECHECKED, GenerationOptions
from flarec.base.interrupts import Interrupts
from flarec.base.prompts import read_prompts
from flarec.errors import DataError, UsageError
from flarec.threads import said

from .loading import check_files, open_model, say_unread
from .options import adapter_option, foreign_options, generation_options, plugin_options, runtime_options

if TYPE_CHECKING:
    from flarec.api import Model, Output

CAUSAL_TOKENS = 8
"""Steps of causal decoding with which `--stats` compares."""


@click.command("generate")
@click.argument("checkpoint", metavar="CKPT")
@click.argument("prompt", metavar="[PROMPT|-]", required=False)
@click.option(
    "--prompts", "prompts_file", metavar="FILE", type=click.Path(path_type=Path),
    help='A prompt per line, or JSONL with "prompt" or "messages" (a closing assistant message is left out). '
    "They share forwards.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=32, show_default=True, metavar="N",
    help="Prompts at the same time; the others wait.",
)
@click.option("--chat", is_flag=True, help="Put the prompt into the chat template; else it is continued as it is.")
@generation_options(
    "mode", "threshold", "denoising_steps", "recheck", "drafts", "max_new_tokens", "temperature", "top_k", "top_p",
    "seed", "stop",
)
@runtime_options
@foreign_options
@adapter_option
@plugin_options
@click.option("--check", is_flag=True, help="Compare every file of CKPT with its hash first, weights of any size too.")
@click.option("--stats", is_flag=True, help="Print tokens, forward passes, time and graphs on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array on stdout, an object per prompt, in order.")
def command(
    checkpoint: str, prompt: str | None, prompts_file: Path | None, batch: int, chat: bool, device: str,
    dtype: str | None, kernels: str, graphs: str, compile: str, mask_token_id: int | None, block_size: int | None,
    adapter: Path | None, plugins: tuple[str, ...], passes: tuple[str, ...], check: bool, stats: bool, as_json: bool,
    **keywords: Any,
) -> None:
    """Generate text with a converted checkpoint CKPT, or causally with any supported model.

    Give one PROMPT (- reads it from stdin), or --prompts FILE. One prompt streams to the terminal.
    """
    prompts = _prompts(prompt, prompts_file)
    options = GenerationOptions(**keywords)
    if check:
        check_files(checkpoint, adapter)
    model = open_model(
        checkpoint, dtype=dtype, device=device, kernels=kernels, mask_token_id=mask_token_id, block_size=block_size,
        passes=passes, plugins=plugins, graphs=graphs, compile=compile, adapter=adapter,
        mode=options.mode, chat=chat or any(not isinstance(prompt, str) for prompt in prompts),
    )
    say_unread(options, str(model.complete(options).mode))
    stream = len(prompts) == 1 and not as_json
    with Interrupts() as interrupts:

        def show(_: int, text: str) -> None:
            interrupts.check()
            click.echo(text, nl=False)

        outputs: list[Output] = model.generate(
            prompts, options, chat=chat, batch=batch, on_text=show if stream else None
        )
    if as_json:
        items = [json.dumps(output.to_dict(), ensure_ascii=False) for output in outputs]
        click.echo("[\n" + ",\n".join(items) + "\n]")
    elif stream:
        click.echo()
    else:
        for number, output in enumerate(outputs, 1):
            click.echo(f"--- prompt {number}")
            click.echo(output.text)
    if stats:
        sys.stdout.flush()
        per_step = model.engine.stats.step_seconds / max(1, model.engine.stats.steps)
        share = model.complete(options).recheck or 0.0
        for line in [*_stats(outputs, model.kernels, share), *model.engine.stats.lines(), said()]:
            click.echo(line, err=True)
        if outputs[0].mode != "causal" and options.drafts not in ("auto", "horizon"):  # they look at what pays
            click.echo(_pays(model, prompts, options, chat, outputs, per_step), err=True)


def _pays(
    model: Model, prompts: list[Any], options: GenerationOptions, chat: bool, outputs: list[Output], trusted: float
) -> str:
    """Whether the mode paid, measured against a few causal steps of the same prompts. trusted: seconds of its steps."""
    from flarec.decode.break_even import NAMES, verdict

    stats, causal = model.engine.stats, replace(options, mode="causal", drafts=None, max_new_tokens=CAUSAL_TOKENS)
    steps, seconds = stats.steps, stats.step_seconds
    model.generate(prompts, replace(causal, stop=(), eos_ids=frozenset()), chat=chat)
    if stats.steps == steps:
        return f"no causal step could be measured, so nothing is said of whether {NAMES[outputs[0].mode]} pays"
    per_step = (stats.step_seconds - seconds) / (stats.steps - steps)
    made = sum(output.new_tokens for output in outputs) / max(1, sum(output.forwards for output in outputs))
    size = model.engine.block_size or 1
    return verdict(trusted, per_step, block_size=size, tokens_per_forward=made, mode=outputs[0].mode)


def _prompts(prompt: str | None, file: Path | None) -> list[Any]:
    if (prompt is None) == (file is None):
        raise UsageError("give one PROMPT (- reads it from stdin) or --prompts FILE")
    if file is not None:
        return [prompt for _, prompt in read_prompts(file)]
    if prompt != "-":
        return [prompt]
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not UTF-8 text ({error}); convert it") from None
    return [text.removesuffix("\n")]  # the newline with which shells end a line is not meant


def _stats(outputs: list[Output], kernels: str, share: float) -> Iterator[str]:
    """share: of the recheck."""
    for number, output in enumerate(outputs, 1):
        name = f"prompt {number}: " if len(outputs) > 1 else ""
        steps = " ".join(f"{n}:{count}" for n, count in enumerate(output.accepted) if count)
        yield (
            f"{name}{output.mode}, {output.new_tokens} tokens in {output.forwards} forwards "
            f"({output.tokens_per_forward:.2f} per forward), {output.seconds:.2f} s on {kernels} kernels, "
            f"stopped by {output.stop_reason}" + (f", accepted per step {steps}" if steps else "")
            + (f", recheck {share:g}: {output.taken_back} taken back" if share and output.mode in RECHECKED else "")
        )
