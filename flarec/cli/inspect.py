"""`flarec inspect`: the program of a model or checkpoint, layer by layer, and what each pass changed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from flarec.errors import UsageError

from .options import kernels_option


@click.command()
@click.argument("source")
@click.option("--target", type=click.Choice(("train", "decode")), default="train", show_default=True, help="Pipeline.")
@click.option("--after", metavar="PASS", help="Stop behind this pass (`capture`: before the first).")
@click.option("--diff", is_flag=True, help="Also show what each pass changed: sites and op counts.")
@click.option("--ops", is_flag=True, help="Also list the nodes of one layer of each kind.")
@click.option("--format", "kind", type=click.Choice(("text", "json", "svg")), default="text", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False), metavar="FILE", help="Write to a file instead of stdout.")
@kernels_option("torch")
def command(
    source: str, target: str, after: str | None, diff: bool, ops: bool, kind: str, out: str | None, kernels: str
) -> None:
    """Show the program of a SOURCE model or checkpoint: mixers, streams, masks, schedules, shapes, caches.

    Only the configuration is read, so this works for models of any size. `--format svg` also draws the attention mask
    and the state schedule of a small example.
    """
    from flarec.files import check_apart, write_file
    from flarec.inspect import as_svg, as_text, open_program, summarize

    if kind != "text" and (diff or ops):
        raise UsageError(f"--diff and --ops belong to --format text; {kind} shows the passes anyway")
    if out is not None:
        check_apart([Path(out)], [Path(source)])
    program = open_program(source, target, after=after, kernels=kernels)
    summary = summarize(program)
    if kind == "svg":
        text = as_svg(summary)
    elif kind == "json":
        text = json.dumps(asdict(summary), indent=2)
    else:
        text = as_text(summary, program, diff=diff, ops=ops)
    if out is None:
        click.echo(text)
        return
    write_file(Path(out), text + "\n")
