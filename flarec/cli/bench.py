"""`flarec bench`: time kernels, decoding and training, put load on a server, and draw what was measured."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from flarec.errors import UsageError

from .options import FiniteRange, compile_option

FORMATS = "svg, svgz, pdf, png, jpg, jpeg, tif, tiff, webp, gif, avif, eps, ps, raw or rgba"

FILE = click.Path(dir_okay=False, path_type=Path)


def _typed(name: str, key: str | None = None) -> str:
    """The command line for a file of results, which others may read: without the key."""
    hidden = {} if key is None else {key: "KEY", f"--api-key={key}": "--api-key=KEY"}
    return shlex.join(["flarec", "bench", name, *(hidden.get(word, word) for word in sys.argv[3:])])


def _check_list(show: bool, out: Path | None) -> None:
    if show and out is not None:
        raise UsageError(f"--list measures nothing, so that --out {out} would hold no results; leave one of them out")


resume_option = click.option(
    "--resume", is_flag=True,
    help="Keep what --out has measured, if device, versions, commit and options are the same; measure the rest.",
)


@click.group("bench")
def command() -> None:
    """Measure Triton kernels against flash-linear-attention and torch, decoding and training against transformers, and
    servers."""


@command.command()
@click.option("--out", type=FILE, metavar="FILE", help="Write the results as JSON.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this row, or rows that begin so (repeatable).")
@click.option("--quick", is_flag=True, help="Only rows with a bar, and shorter timings.")
@click.option("--time-limit", type=FiniteRange(min=0), metavar="S", help="Begin no row after S seconds.")
@click.option("--commit", metavar="ID", help="Commit of the tree, kept in the results.")
@click.option("--device", default="cuda", show_default=True, metavar="NAME", help="cuda, cuda:1 ...")
@resume_option
@click.option("--list", "show", is_flag=True, help="List the rows and stop.")
def kernels(
    out: Path | None, only: tuple[str, ...], quick: bool, time_limit: float | None, commit: str | None, device: str,
    resume: bool, show: bool,
) -> None:
    """Check every kernel against its float64 reference, then time it.

    A kernel that fails its check is not timed. Rows against flash-linear-attention need that package. Exit code 1 if a
    row fails or misses its bar.
    """
    _check_list(show, out)
    from flarec.bench.rows import select
    from flarec.bench.run import TIME_LIMIT, run_kernels

    if show:
        for row in select(only, quick=quick):
            click.echo(f"{row.name:<26}{row.title}")
        return
    lines = run_kernels(
        only=only, quick=quick, out=out, commit=commit, device=device, say=click.echo,
        time_limit=TIME_LIMIT if time_limit is None else time_limit,
        command=_typed("kernels"), resume=resume,
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
@click.option("--time-limit", type=FiniteRange(min=0), default=280, show_default=True, metavar="S",
              help="Begin no row after S seconds.")
@click.option("--library", type=click.Path(file_okay=False, exists=True, path_type=Path), metavar="DIR",
              help="A folder with flash-linear-attention, for the stock model's prefill alone.")
@click.option("--commit", metavar="ID", help="Commit of the tree, kept in the results.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1 ...")
@compile_option
@resume_option
@click.option("--list", "show", is_flag=True, help="List the rows and stop.")
def decode(
    shape: str, out: Path | None, only: tuple[str, ...], context: int, block_size: int, steps: int,
    time_limit: float, library: Path | None, commit: str | None, device: str, compile: str, resume: bool,
    show: bool,
) -> None:
    """Time steps of decoding with random weights, beside stock transformers in the same run.

    Exit code 1 if a row fails or misses its bar. On a CPU only the form of the results means something.
    """
    _check_list(show, out)
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
    from flarec.device import resolve_compile, torch_device

    place = torch_device(device)
    session = ServingSession(
        place, shape, block=block_size, context=context, steps=steps, compile=resolve_compile(compile, place),
        library=library,
    )
    lines = run_session(
        rows, session, out=out, commit=commit, time_limit=time_limit, say=click.echo, warm_up=False,
        command=_typed("decode"), resume=resume,
    )
    Console(width=160).print(table(lines, title=f"Decoding, {shape}, context {context}, blocks of {block_size}"))
    if any(line.status == "failed" or line.verdict == "missed" for line in lines):
        sys.exit(1)


@command.command()
@click.option("--shape", type=click.Choice(("2B", "4B", "9B", "tiny")), default="2B", show_default=True,
              help="Of Qwen3.5.")
@click.option("--out", type=FILE, metavar="FILE", help="Write the results as JSON.")
@click.option("--only", multiple=True, metavar="NAME", help="Only this row, or rows that begin so (repeatable).")
@click.option("--rows", type=click.IntRange(min=1), default=8, show_default=True, metavar="N", help="Of a step.")
@click.option("--length", type=click.IntRange(min=16), default=2048, show_default=True, metavar="N", help="Of a row.")
@click.option("--micro", multiple=True, type=click.IntRange(min=1), metavar="N",
              help="Rows of a pass (repeatable). Default: some of each part, the fastest counts.")
@click.option("--library", type=click.Path(file_okay=False, exists=True, path_type=Path), metavar="DIR",
              help="A folder with flash-linear-attention, for the stock model alone.")
@click.option("--quick", is_flag=True, help="Shorter timings.")
@click.option("--ahead/--no-ahead", default=True, show_default=True, help="Compile kernels in parallel before.")
@click.option("--time-limit", type=FiniteRange(min=0), default=540, show_default=True, metavar="S",
              help="Begin no part after S seconds, and stop the one that runs.")
@click.option("--commit", metavar="ID", help="Commit of the tree, kept in the results.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1 ...")
@compile_option
@resume_option
@click.option("--list", "show", is_flag=True, help="List the rows and stop.")
def train(
    shape: str, out: Path | None, only: tuple[str, ...], rows: int, length: int, micro: tuple[int, ...],
    library: Path | None, quick: bool, ahead: bool, time_limit: float, commit: str | None, device: str, compile: str,
    resume: bool, show: bool,
) -> None:
    """Time optimizer steps with random weights, beside fine-tuning of stock transformers in the same run.

    Every part runs in a process of its own; one that fails or has no time left is recorded and the others go on. Exit
    code 1 if a row fails or misses its bar. On a CPU only the form of the results means something.
    """
    _check_list(show, out)
    from flarec.bench.training.rows import EXTRA, select

    chosen = select(only)
    if show:
        for row in (*chosen, *(() if only else EXTRA)):
            click.echo(f"{row.name:<26}{row.title}")
        return
    from rich.console import Console

    from flarec.bench.report import table
    from flarec.bench.training.run import run_training
    from flarec.bench.training.session import TrainingSession
    from flarec.device import torch_device

    session = TrainingSession(
        torch_device(device), shape, rows=rows, length=length, micro=micro, compile=compile, library=library,
        quick=quick, limit=time_limit,
    )
    lines = run_training(
        chosen, session, out=out, commit=commit, say=click.echo, ahead=ahead, command=_typed("train"), resume=resume
    )
    Console(width=160).print(table(lines, title=f"Training, {shape}, {rows} rows of {length} clean tokens"))
    if any(line.status == "failed" or line.verdict == "missed" for line in lines):
        sys.exit(1)


@command.command()
@click.argument("url", metavar="URL")
@click.option("--prompts", type=FILE, required=True, metavar="FILE", help="A prompt per line, or JSONL; used in turn.")
@click.option("--mode", "modes", multiple=True, metavar="NAME",
              help="Of flarec's own server (repeatable): causal, ar-trust ... Default: the server's.")
@click.option("--clients", multiple=True, type=click.IntRange(min=1), metavar="N",
              help="Closed loop: so many clients, each asks again when it was answered (repeatable). Default: 1 to 64.")
@click.option("--rate", "rates", multiple=True, type=FiniteRange(min=0, min_open=True), metavar="R",
              help="Open loop: R requests per second, at random times (repeatable).")
@click.option("--requests", type=click.IntRange(min=1), metavar="N", help="Of each load. Default: 4 per client.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, metavar="N", help="New ones.")
@click.option("--temperature", type=FiniteRange(min=0), default=0, show_default=True, metavar="T")
@click.option("--chat/--text", default=True, show_default=True, help="Send texts as a user's message, or as they are.")
@click.option("--api-key", envvar="FLAREC_API_KEY", metavar="KEY", help="Of the server. Default: $FLAREC_API_KEY.")
@click.option("--out", type=FILE, metavar="FILE", help="Write the results as JSON.")
@click.option("--plot", "picture", type=FILE, metavar="FILE", help=f"Draw them: {FORMATS}.")
@click.option("--commit", metavar="ID", help="Commit of the tree, kept in the results.")
def serve(
    url: str, prompts: Path, modes: tuple[str, ...], clients: tuple[int, ...], rates: tuple[float, ...],
    requests: int | None, max_tokens: int, temperature: float, chat: bool, api_key: str | None, out: Path | None,
    picture: Path | None, commit: str | None,
) -> None:
    """Put load on the OpenAI-compatible server at URL (http://127.0.0.1:8000/v1), flarec's or another one.

    Tokens per second, time to the first token and per token; from /metrics of flarec's server also tokens per forward
    and accepted drafts by position. Exit code 1 if a request got no answer.
    """
    import asyncio

    from flarec.base.files import check_apart, write_file
    from flarec.base.prompts import read_prompts
    from flarec.bench.figures import check_picture
    from flarec.bench.report import make_place
    from flarec.bench.serve.client import Server
    from flarec.bench.serve.picture import draw_loads
    from flarec.bench.serve.results import LoadResult, record
    from flarec.bench.serve.session import LoadPlan, run_loads

    for path, option in ((out, "--out"), (picture, "--plot")):
        if path is not None:
            check_apart([path], [prompts], option)
            make_place(path, option)
    if picture is not None:
        check_picture(picture)
    server = Server.at(url, api_key)
    plan = LoadPlan(
        [prompt for _, prompt in read_prompts(prompts)], modes or ("",), clients or (() if rates else LoadPlan.clients),
        rates, requests or 0, {"max_tokens": max_tokens, "temperature": temperature}, chat,
    )

    def say(item: LoadResult) -> None:
        click.echo(item.text())

    results = asyncio.run(run_loads(server, plan, say))
    if out is not None:
        write_file(out, record(results, url=url, command=_typed("serve", api_key), commit=commit))
    if picture is not None:
        draw_loads(results, picture)
    if any(item.errors for item in results):
        sys.exit(1)


@command.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--out", type=FILE, required=True, metavar="FILE",
              help=f"The suffix chooses the format: {FORMATS}.")
def plot(results: Path, out: Path) -> None:
    """Draw time against block size from the JSON file of `flarec bench kernels`, or tokens per second against requests
    from that of `flarec bench decode`."""
    from flarec.bench.plot import draw

    draw(results, out)
