"""`flarec doctor`: what a model needs to be converted and served, without its weights."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from flarec.errors import UsageError
from flarec.threads import said
from flarec.train.arguments import DEFAULT_RECIPE, Arguments

from .options import field_options

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.table import Table

    from flarec.doctor import DataReport, Report


WIDTH = 118  # of what is not a terminal


OWN = {
    "data.max_length": "--length N", "max_length": "--length N", "max_seq_length": "--length N",
    "optimizer.micro_rows": "--batch N", "per_device_train_batch_size": "--batch N",
}
"""Recipe keys, and names of transformers for them, in whose place this command has options."""


@click.command()
@click.argument("source")
@click.option("--length", type=int, default=2048, show_default=True, help="Tokens per training row and per request.")
@click.option("--batch", type=int, default=1, show_default=True, help="Rows per forward pass, and requests served.")
@click.option(
    "--recipe", default=DEFAULT_RECIPE, show_default=True, metavar="NAME|FILE",
    help="Blocks and views of the training step.",
)
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="Whose speed counts: cpu, cuda ...")
@click.option("--dtype", metavar="NAME", help="That serves. Default: float32 on the CPU, else as stored.")
@click.option("--kernels", is_flag=True, help="Also say which mixers the Triton kernels would run, and why not others.")
@click.option("--quick", is_flag=True, help="Only capture: no memory and no time.")
@click.option(
    "--data", multiple=True, metavar="PATH[:WEIGHT]",
    help="Training data: also say what they are in SOURCE's tokens, what rows of --length cut off, and what repeats.",
)
@field_options(Arguments, "overrides", "dequantize", "gguf", "merge_adapter")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    source: str, length: int, batch: int, recipe: str, device: str, dtype: str | None, kernels: bool, quick: bool,
    data: tuple[str, ...], overrides: tuple[str, ...], dequantize: bool, gguf: str | None, merge_adapter: str | None,
    as_json: bool,
) -> None:
    """Examine SOURCE (model directory, config.json or hub id): does it convert, what is it made of, what does it need.

    Only the configuration is read, and the headers of the weight files (with --data also the tokenizer and the data).
    Memory is that of one training step and of decoding, run without numbers; times are extrapolated from a
    micro-benchmark of this device. Exit code 1 if the model does not convert.
    """
    from flarec.device import torch_device, torch_dtype
    from flarec.doctor import diagnose
    from flarec.recipe import load_recipe

    for override in overrides:  # rows are this command's own: a key that changed nothing would say something wrong
        if (option := OWN.get(override.partition("=")[0].strip())) is not None:
            raise UsageError(f"--set {override}: flarec doctor has own options for the size of rows; give {option}")
    report = diagnose(
        source,
        load_recipe(recipe).override(overrides),
        length=length,
        batch=batch,
        device=torch_device(device),
        dtype=torch_dtype(dtype),
        kernels=kernels,
        estimate=not quick,
        gguf=gguf,
        merge_adapter=merge_adapter,
        data=data,
        dequantize=dequantize,
        say=lambda text: click.echo(text, err=True),
    )
    if as_json:
        click.echo(json.dumps(_plain(report), indent=2))
    else:
        _print(report)
    if not report.converts:
        sys.exit(1)


def _plain(report: Report) -> dict[str, object]:
    table = asdict(report)
    for name in ("convert", "serve"):
        memory = getattr(report, name)
        if memory is not None:
            table[name]["total"] = memory.total
    return table


def _print(report: Report) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for label, text in _head(report):
        console.print(f"{label:<12}{text}", markup=False, highlight=False, soft_wrap=True)
    for title, table in _tables(report):
        console.print(f"\n{title}", markup=False, highlight=False, soft_wrap=True)
        console.print(table)
    for line in _notes(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _head(report: Report) -> Iterator[tuple[str, str]]:
    seen = report.anatomy
    if seen is not None:
        row = "in the adapter table" if seen.known_family else _without_row(seen.family)
        yield "model", f"{seen.model} ({seen.family}; {row})"
        if seen.wrapper:
            yield "", f"text model of {seen.wrapper}; the rest of it is carried over untouched"
        yield "parameters", f"{seen.parameters:,}, vocabulary {seen.vocab_size:,}"
        for index, (text, count) in enumerate(seen.layers):
            yield "layers" if index == 0 else "", f"{count} x {text}"
    if report.capture_seconds is not None:
        yield "captured", f"in {report.capture_seconds:.1f} s"
    yield "converts", "yes" if report.converts else f"no: {report.reason}"
    if report.estimate_note:
        yield "", report.estimate_note
    for found in report.data:
        yield "data", found.text
        parts = [f"{part} have up to {count:,}" for part, count in found.lengths.items()]
        yield "", f"tokens before any cut: {', '.join(parts)}; the longest {_longest(found)}"
        rows = f"at least {found.rows:,} rows of {report.length:,} tokens"
        yield "", f"{rows}, which the recipe's run passes about {found.epochs:,.2f} times"
        for line in found.advice:
            yield "", line


def _longest(found: DataReport) -> str:
    return ", ".join(f"{count:,} ({place})" for count, place in found.longest)


def _without_row(family: str) -> str:
    from flarec.frontend.families import PLAIN

    listed = "listed" if family in PLAIN else "not listed, taken"
    return f"{listed} as a plain softmax model, which needs no adapter row"


def _tables(report: Report) -> Iterator[tuple[str, Table]]:
    from rich.table import Table

    sizes = f"{report.batch} x {report.length:,}"
    for title, memory in (
        (f"memory to convert: {report.train_dtype}, rows of {sizes} tokens, recipe {report.recipe}", report.convert),
        (f"memory to serve: {report.serve_dtype}, requests of {sizes} positions", report.serve),
    ):
        if memory is not None:
            table = Table.grid(padding=(0, 2))
            for name, count in _rows(memory.parts, memory.total):
                table.add_row(f"  {name}", count)
            yield title, table
    if report.speed:
        table = Table("step", "time", "GFLOP", "GB moved", "operations", box=None, pad_edge=False)
        for speed in report.speed:
            table.add_row(
                speed.step, _seconds(speed.seconds), f"{speed.flops / 1e9:,.1f}", f"{speed.bytes / 1e9:,.2f}",
                f"{speed.calls:,}",
            )
        yield "time of one step, extrapolated (kernels: torch)", table
    if report.sites:
        table = Table("pipeline", "mixer", "sites", "--kernels triton", "why not", box=None, pad_edge=False)
        for site in report.sites:
            table.add_row(site.target, site.mixer, str(site.count), site.choice, site.why)
        yield "what would compute the mixers", table


def _rows(parts: Mapping[str, int], total: int) -> Iterator[tuple[str, str]]:
    for name, count in parts.items():
        yield name, size_text(count)
    yield "at the worst moment", size_text(total)


def _notes(report: Report) -> Iterator[str]:
    if report.memory_note:
        yield report.memory_note
    yield from report.advice
    if report.memory is not None and not report.advice:
        yield f"this machine has {size_text(report.memory)}: enough"
    if report.pays:
        yield report.pays
    if report.serve is not None:
        fixed, each = report.cache_bytes
        yield f"caches: {size_text(fixed)} per request and {each:,} bytes per position of it"
    if report.kernels_note:
        yield report.kernels_note
    if report.rates:
        yield said()
    for rates in report.rates:
        spans = [(kind, near, rates.far[kind]) for kind, near in rates.near.items()]
        flops = ", ".join(f"{kind} {rate / 1e9:,.0f} GFLOP/s" for kind, rate in rates.flops.items())
        moved = ", ".join(f"{kind} {near / 1e9:,.0f} to {rate / 1e9:,.1f}" for kind, near, rate in spans)
        yield f"measured on {rates.device}, {rates.dtype}, {rates.threads} threads: {flops}"
        yield f"  GB/s, small to large: {moved}; {rates.call * 1e6:.1f} us per operation"


def size_text(count: int) -> str:
    """GB = 10^9 bytes or MB = 10^6 bytes."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _seconds(value: float) -> str:
    return f"{value:,.1f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
