"""`flarec bench`: time the kernels on a GPU, and draw what was measured."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

FILE = click.Path(dir_okay=False, path_type=Path)


@click.group("bench")
def command() -> None:
    """Measure the Triton kernels against flash-linear-attention and torch, and decoding against transformers."""


@command.command()
@click.option("--out", type=FILE, metavar="FILE", help="Write the results as JSON.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this row, or rows that begin so (repeatable).")
@click.option("--quick", is_flag=True, help="Only rows with a bar, and shorter timings.")
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="S", help="Begin no row after S seconds.")
@click.option("--commit", metavar="ID", help="Commit of the tree, kept in the results.")
@click.option("--device", default="cuda", show_default=True, metavar="NAME", help="cuda, cuda:1 ...")
@click.option("--list", "show", is_flag=True, help="List the rows and stop.")
def kernels(
    out: Path | None, only: tuple[str, ...], quick: bool, time_limit: float | None, commit: str | None, device: str,
    show: bool,
) -> None:
    """Check every kernel against its float64 reference, then time it.

    A kernel that fails its check is not timed. Rows against flash-linear-attention need that package. Exit code 1 if a
    row fails or misses its bar.
    """
    from flarec.bench.rows import select
    from flarec.bench.run import TIME_LIMIT, run_kernels

    if show:
        for row in select(only, quick=quick):
            click.echo(f"{row.name:<26}{row.title}")
        return
    lines = run_kernels(
        only=only, quick=quick, out=out, commit=commit, device=device, say=click.echo,
        time_limit=TIME_LIMIT if time_limit is None else time_limit,
        command=" ".join(["flarec bench kernels", *map(shlex.quote, sys.argv[3:])]),
    )
    from rich.console import Console

    from flarec.bench.report import table

    Console(width=160).print(table(lines))
    if any(line.status == "failed" or line.verdict == "missed" for line in lines):
        sys.exit(1)


@command.command()
@click.option("--shape", type=click.Choice(("2B", "4B", "tiny")), default="2B", show_default=True, help="Of Qwen3.5.")
@click.option("--out", type=FILE, metavar="FILE", help="Write the results as JSON.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this row, or rows that begin so (repeatable).")
@click.option("--context", type=click.IntRange(min=8), default=512, show_default=True, metavar="N", help="Of prompts.")
@click.option("--block-size", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Positions.")
@click.option("--steps", type=click.IntRange(min=2), default=200, show_default=True, metavar="N", help="Timed steps.")
@click.option("--time-limit", type=click.FloatRange(min=0), default=280, show_default=True, metavar="S",
              help="Begin no row after S seconds.")
@click.option("--commit", metavar="ID", help="Commit of the tree, kept in the results.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1 ...")
@click.option("--list", "show", is_flag=True, help="List the rows and stop.")
def decode(
    shape: str, out: Path | None, only: tuple[str, ...], context: int, block_size: int, steps: int,
    time_limit: float, commit: str | None, device: str, show: bool,
) -> None:
    """Time steps of decoding with random weights, beside stock transformers in the same run.

    Exit code 1 if a row fails or misses its bar. On a CPU only the form of the results means something.
    """
    from flarec.bench.serving.rows import select

    rows = select(only)
    if show:
        for row in rows:
            click.echo(f"{row.name:<26}{row.title}")
        return
    from rich.console import Console

    from flarec.bench.report import table
    from flarec.bench.run import run_session
    from flarec.bench.serving.models import ServingSession
    from flarec.device import torch_device

    session = ServingSession(torch_device(device), shape, block=block_size, context=context, steps=steps)
    lines = run_session(
        rows, session, out=out, commit=commit, time_limit=time_limit, say=click.echo, warm_up=False,
        command=" ".join(["flarec bench decode", *map(shlex.quote, sys.argv[3:])]),
    )
    Console(width=160).print(table(lines, title=f"Decoding, {shape}, context {context}, blocks of {block_size}"))
    if any(line.status == "failed" or line.verdict == "missed" for line in lines):
        sys.exit(1)


@command.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--out", type=FILE, required=True, metavar="FILE", help="svg, png or pdf.")
def plot(results: Path, out: Path) -> None:
    """Draw time against block size from the JSON file of `flarec bench kernels`."""
    from flarec.bench.plot import draw

    draw(results, out)
