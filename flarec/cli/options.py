"""Options that several commands share."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
from click.core import ParameterSource

from flarec.base.fields import TEXTS, field_types, option_name
from flarec.base.generation import GenerationOptions
from flarec.errors import UsageError
from flarec.train.arguments import Arguments


class FiniteRange(click.FloatRange):
    """`click.FloatRange` that takes numbers only: nan lies within every range, because it is not outside of it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


def field_options(cls: Any, *names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options made from these fields of a dataclass: their names, types, defaults and documentation."""
    known = {item.name: item for item in fields(cls)}

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            command = _option(known[name], field_types(cls)[name])(command)
        return command

    return add


def _option(item: Field[Any], hint: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option of one field; None in its type stands for the default."""
    shown = {"help": item.metadata["doc"], "metavar": item.metadata["metavar"]}
    if hint == TEXTS:
        return click.option(option_name(item), item.name, multiple=True, default=(), **shown)
    if hint is bool:
        return click.option(option_name(item), item.name, is_flag=True, help=item.metadata["doc"])
    if NoneType in get_args(hint):
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    kind: Any = click.Choice(get_args(hint)) if get_origin(hint) is Literal else hint
    kind = click.Path(path_type=Path) if kind is Path else kind
    if item.default is MISSING:
        return click.option(option_name(item), item.name, type=kind, required=True, **shown)
    return click.option(
        option_name(item), item.name, type=kind, default=item.default, show_default=item.default is not None, **shown
    )


def given(ctx: click.Context) -> list[click.Parameter]:
    """Parameters of a command about which the user said something, with the default's value or another."""
    said = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return [one for one in ctx.command.params if ctx.get_parameter_source(str(one.name)) in said]


def resume_command(name: str, arguments: Any, options: Iterable[Field[Any]]) -> str:
    """The command line that continues a run which was started with these arguments, to its end; they have the field
    `resume`."""
    words = ["flarec", name, arguments.source]
    for item in options:
        value = True if item.name == "resume" else getattr(arguments, item.name)
        if value == item.default or item.name == "stop_after":
            continue
        if isinstance(value, bool):
            words.append(option_name(item))
        else:
            for part in value if isinstance(value, tuple) else (value,):
                words += [option_name(item), str(part)]
    return shlex.join(words)


def kernels_option(default: str) -> Callable[..., Any]:
    """`--kernels`; "auto" is for commands that run a model on a device."""
    if default == "auto":
        return field_options(Arguments, "kernels")
    text = "What computes the token mixers: triton, torch or reference."
    return click.option("--kernels", default=default, show_default=True, metavar="NAME", help=text)


plugin_options = field_options(Arguments, "plugins", "passes")
"""`--plugin`, `--pass`: passes of others."""


compile_option = click.option(
    "--compile", type=click.Choice(("auto", "on", "off")), default="auto", show_default=True,
    help="Compile what lies between token mixers. on: at the first steps, which take long then; auto: on a GPU, after "
    "1000 steps.",
)
"""`--compile`: of commands that decode."""


def runtime_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--device`, `--dtype`, `--kernels`, `--graphs`, `--compile`: where and in what a model computes."""
    for option in reversed((
        click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1 ..."),
        click.option(
            "--dtype", metavar="NAME", help="float32, bfloat16, float16. Default: float32 on the CPU, else as stored."
        ),
        kernels_option("auto"),
        click.option(
            "--graphs", type=click.Choice(("auto", "off")), default="auto", show_default=True,
            help="auto: on a GPU steps of decoding are captured as CUDA graphs; off: for debugging.",
        ),
        compile_option,
    )):
        command = option(command)
    return command


generation_options = partial(field_options, GenerationOptions)
"""Options made from these fields of `GenerationOptions`."""


def foreign_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--mask-token-id`, `--block-size`: what another program's dual-mode checkpoint may not state."""
    note = "Of a dual-mode checkpoint that another program wrote"
    for option in reversed((
        click.option(
            "--mask-token-id", type=int, metavar="ID",
            help=f"{note}: the vocabulary row of its mask token. Default: mask_token_id in its config.json.",
        ),
        click.option(
            "--block-size", type=int, metavar="N",
            help=f"{note}: positions per block. Default: block_size in its config.json.",
        ),
    )):
        command = option(command)
    return command


def adapter_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--adapter`: of a directory that holds no model."""
    text = "What `flarec convert --adapter-only` wrote for this model; another model is refused."
    return click.option("--adapter", type=click.Path(path_type=Path), metavar="DIR", help=text)(command)


data_option = click.option(
    "--data", required=True, metavar="FILE", type=click.Path(path_type=Path),
    help='Records as for training. Those with "answer" and "pattern" (a regular expression with a group), or with '
    '"tests" (Python code), count for accuracy.',
)
"""`--data`: of commands that grade answers."""


def asking_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--limit`, `--batch`, `--samples`, `--thinking`, `--execute`: which records are asked, and how."""
    for option in reversed((
        click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use only the first N records."),
        click.option(
            "--batch", type=click.IntRange(1), default=8, show_default=True, metavar="N",
            help="Prompts at the same time.",
        ),
        click.option(
            "--samples", type=click.IntRange(1), default=1, show_default=True, metavar="N",
            help="Answers per prompt, at a temperature; the seed of each is one higher.",
        ),
        click.option(
            "--thinking/--no-thinking", default=None,
            help="The chat template's enable_thinking, for records that do not state it. Default: the template's.",
        ),
        click.option(
            "--execute", is_flag=True,
            help='Run the Python code of answers to records with "tests". It has limits on time and memory and no '
            "sandbox beyond: use a machine that has nothing to lose.",
        ),
    )):
        command = option(command)
    return command


def check_data(data: Path, out: Path | None) -> None:
    """Raise `UsageError` for data that are not there, and for an output without a directory, before anything slow."""
    if not data.exists():
        raise UsageError(f"--data {data} does not exist; give a JSONL or Parquet file")
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: there is no directory {out.parent}; make it first")


prefix_option = click.option(
    "--prefix-cache", type=click.IntRange(min=0), default=1024, show_default=True, metavar="MIB",
    help="Memory for what was read of earlier prompts: one that begins like them goes on from there. 0: none.",
)
"""`--prefix-cache`: of commands that meet the same beginnings again."""
