"""`flarec report`: one page about a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click

from flarec.base.files import check_apart, check_name, write_file
from flarec.base.generation import GenerationOptions
from flarec.base.prompts import read_prompts
from flarec.errors import UsageError

from .loading import open_model, say_unread
from .options import adapter_option, generation_options, given, runtime_options

FILE: Any = click.Path(path_type=Path)
OPTIONS = ("mode", "max_new_tokens", "temperature", "seed")
WITHOUT_SAMPLES = ("checkpoint", "out", "markdown", "records", "adapter", "debug")
"""Parameters that mean something without prompts to be answered."""


@click.command("report")
@click.argument("checkpoint", metavar="CKPT")
@click.option("--out", type=FILE, metavar="FILE", help="HTML. Default without --markdown: CKPT's name, -report.html.")
@click.option("--markdown", type=FILE, metavar="FILE", help="The same as Markdown: numbers without figures.")
@click.option(
    "--prompts", "prompts_file", type=FILE, metavar="FILE",
    help='Let the checkpoint answer these: a prompt per line, or JSONL with "prompt" or "messages".',
)
@click.option(
    "--samples", type=click.IntRange(1), default=4, show_default=True, metavar="N", help="Of the first N prompts.",
)
@click.option("--chat", is_flag=True, help="Put each prompt into the chat template; else it is continued as it is.")
@generation_options(*OPTIONS)
@click.option(
    "--eval", "records", type=FILE, multiple=True, metavar="RECORD",
    help="A record of `flarec eval --out`, of this checkpoint or of a model beside it; may be given again.",
)
@runtime_options
@adapter_option
@click.pass_context
def command(
    ctx: click.Context, /, checkpoint: str, out: Path | None, markdown: Path | None, prompts_file: Path | None,
    samples: int, chat: bool, records: tuple[Path, ...], device: str, dtype: str | None, kernels: str, graphs: str,
    compile: str, adapter: Path | None, **keywords: Any,
) -> None:
    """Write one page about the converted CKPT: losses, probes, tokens per forward, accuracy, router load, and samples
    with drafted, accepted and corrected tokens coloured.

    Numbers are those that the run and evaluations recorded; what is not recorded is said. Of an adapter alone, CKPT may
    be its directory; samples need the model: SOURCE --adapter DIR.
    """
    options = GenerationOptions(**keywords)
    said = [parameter for parameter in given(ctx) if parameter.name not in WITHOUT_SAMPLES]
    if prompts_file is None and said:
        raise UsageError(f"{said[0].opts[0]} is for --prompts FILE, whose answers it is about; leave it out")
    from flarec.report import chapters, read_evaluations, read_recorded, samples_of, to_html, to_markdown

    place = checkpoint if adapter is None else str(adapter)
    run = read_recorded(place)
    if out is None and markdown is None:
        out = Path(f"{run.name.rpartition('/')[2]}-report.html")
    outputs = {"--out": out, "--markdown": markdown}
    inputs = [Path(checkpoint), Path(place), *records, *([prompts_file] if prompts_file else [])]
    _check({option: path for option, path in outputs.items() if path is not None}, inputs)
    evaluations = read_evaluations(records, run.manifest)
    written = []
    if prompts_file is not None:
        prompts = [prompt for _, prompt in islice(read_prompts(prompts_file), samples)]
        model = open_model(
            checkpoint, dtype=dtype, device=device, kernels=kernels, mask_token_id=None, block_size=None, graphs=graphs,
            compile=compile, adapter=adapter, mode=options.mode,
            chat=chat or any(not isinstance(prompt, str) for prompt in prompts),
        )
        say_unread(options, str(model.complete(options).mode))
        written = samples_of(model, prompts, options, chat=chat)
    parts = chapters(run, evaluations)
    texts = [
        (option, path, render(run.name, parts, written))
        for (option, path), render in zip(outputs.items(), (to_html, to_markdown), strict=True)
        if path is not None
    ]
    for option, path, text in texts:
        write_file(path, text, option)
        click.echo(f"written: {path}")


def _check(outputs: Mapping[str, Path], inputs: Sequence[Path]) -> None:
    """Raise `UsageError` for outputs that are no place for a file, before anything slow. outputs: option -> path."""
    for option, path in outputs.items():
        check_name(path, option)
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no directory {path.parent}; make it first")
        if path.is_dir():
            raise UsageError(f"{path} is a directory; give the name of a file")
        check_apart([path], inputs, option)
    if len(outputs) > len({os.path.realpath(path) for path in outputs.values()}):
        raise UsageError(f"--out and --markdown are both {outputs['--out']}; give two names")
