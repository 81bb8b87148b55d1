"""`flarec inspect`: the program of a model or checkpoint, layer by layer, and what each pass changed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flarec.errors import UsageError
from flarec.train.arguments import Arguments

from .options import adapter_option, field_options, kernels_option, plugin_options

if TYPE_CHECKING:
    from flarec.ir.pipeline import Pass


@click.command()
@click.argument("source")
@click.option("--target", type=click.Choice(("train", "decode")), default="train", show_default=True, help="Pipeline.")
@click.option("--after", metavar="PASS", help="Stop behind this pass (`capture`: before the first).")
@click.option("--diff", is_flag=True, help="Also show what each pass changed: sites, op counts and lines.")
@click.option("--ops", is_flag=True, help="Also list the nodes of one layer of each kind.")
@click.option("--format", "kind", type=click.Choice(("text", "json", "svg")), default="text", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False), metavar="FILE", help="Write to a file instead of stdout.")
@click.option("--pipeline", "whole", is_flag=True, help="Show the passes alone: who requires and provides what.")
@field_options(Arguments, "gguf")
@kernels_option("torch")
@adapter_option
@plugin_options
def command(
    source: str, target: str, after: str | None, diff: bool, ops: bool, kind: str, out: str | None, whole: bool,
    gguf: str | None, kernels: str, adapter: Path | None, plugins: tuple[str, ...], passes: tuple[str, ...],
) -> None:
    """Show the program of a SOURCE model or checkpoint: mixers, streams, masks, schedules, shapes, caches.

    Only the configuration is read, so this works for models of any size. `--format svg` also draws the attention mask
    and the state schedule of a small example.
    """
    import torch

    from flarec.base.files import check_apart
    from flarec.device import torch_device
    from flarec.frontend.source.gguf import without_gguf
    from flarec.inspect import as_svg, as_text, open_program, summarize
    from flarec.inspect.lines import Recorder
    from flarec.inspect.open import steps_of

    if out is not None:
        check_apart([Path(out)], [Path(source), *map(Path, plugins)])
    if whole:
        if after is not None or diff or ops:
            raise UsageError("--pipeline shows the passes alone; leave out --after, --diff and --ops")
        steps = steps_of(source, target, kernels=kernels, passes=passes, plugins=plugins, adapter=adapter)
        _write(_pipeline(steps, target, kind), out)
        return
    if kind != "text" and (diff or ops):
        raise UsageError(f"--diff and --ops belong to --format text; {kind} shows the passes anyway")
    recorder = Recorder() if diff else None
    with without_gguf(source, gguf) as location:
        program = open_program(
            location, target, after=after, kernels=kernels, passes=passes, plugins=plugins, on_pass=recorder,
            adapter=adapter,
            dtype=None if torch_device("auto").type == "cuda" else torch.float32,  # as `generate` runs it here
        )
    summary = summarize(program)
    if kind == "svg":
        text = as_svg(summary)
    elif kind == "json":
        text = json.dumps(asdict(summary), indent=2)
    else:
        text = as_text(summary, program, diff=recorder, ops=ops)
        if out is None:
            text = "\n".join(map(_coloured, text.split("\n")))  # echo drops colours that no terminal shows
    _write(text, out)


def _coloured(line: str) -> str:
    """Lines that a pass took out in red, those that it put in in green."""
    colour = {"- ": "red", "+ ": "green"}.get(line[8:10]) if line.startswith(" " * 8) else None
    return click.style(line, fg=colour) if colour else line


def _pipeline(steps: list[Pass], target: str, kind: str) -> str:
    """The passes of a model or checkpoint, which is not captured for it."""
    from flarec.inspect.pipeline import pipeline_as_svg, pipeline_as_text, pipeline_table

    if kind == "json":
        return json.dumps(pipeline_table(steps), indent=2)
    return pipeline_as_svg(steps, target) if kind == "svg" else pipeline_as_text(steps, target)


def _write(text: str, out: str | None) -> None:
    if out is None:
        click.echo(text)
        return
    from flarec.base.files import write_file

    write_file(Path(out), text + "\n")
