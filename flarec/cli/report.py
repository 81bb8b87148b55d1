"""`flarec report`: one page about a checkpoint."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import click

from flarec.base.files import check_apart, check_name, write_file
from flarec.base.generation import GenerationOptions
from flarec.base.prompts import read_prompts
from flarec.errors import UsageError

from .loading import open_model, say_unread
from .options import adapter_option, generation_options, runtime_options

FILE: Any = click.Path(path_type=Path)
OPTIONS = ("mode", "max_new_tokens", "temperature", "seed")


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
def command(
    checkpoint: str, out: Path | None, markdown: Path | None, prompts_file: Path | None, samples: int, chat: bool,
    records: tuple[Path, ...], device: str, dtype: str | None, kernels: str, graphs: str, compile: str,
    adapter: Path | None, **keywords: Any,
) -> None:
    """Write one page about the converted CKPT: losses, probes, tokens per forward, accuracy, router load, and samples
    with drafted, accepted and corrected tokens coloured.

    Numbers are those that the run and evaluations recorded; what is not recorded is said. Of an adapter alone, CKPT may
    be its directory; samples need the model: SOURCE --adapter DIR.
    """
    options = GenerationOptions(**keywords)
    from flarec.report import chapters, read_evaluations, read_recorded, samples_of, to_html, to_markdown

    place = checkpoint if adapter is None else str(adapter)
    run = read_recorded(place)
    if out is None and markdown is None:
        out = Path(f"{run.name}-report.html")
    outputs = [path for path in (out, markdown) if path is not None]
    _check(outputs, [Path(checkpoint), Path(place), *records, *([prompts_file] if prompts_file else [])])
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
    for path, render in ((out, to_html), (markdown, to_markdown)):
        if path is not None:
            write_file(path, render(run.name, parts, written), "--out" if path is out else "--markdown")
            click.echo(f"written: {path}")


def _check(outputs: list[Path], inputs: list[Path]) -> None:
    """Raise `UsageError` for outputs that are no place for a file, before anything slow."""
    for path, option in zip(outputs, ("--out", "--markdown"), strict=False):
        check_name(path, option)
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no directory {path.parent}; make it first")
        if path.is_dir():
            raise UsageError(f"{path} is a directory; give the name of a file")
    if len(outputs) == 2 and outputs[0].absolute() == outputs[1].absolute():
        raise UsageError(f"--out and --markdown are both {outputs[0]}; give two names")
    check_apart(outputs, inputs)
