"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

import click

from flarec.generation import GenerationOptions, field_type

_FIELDS = {item.name: item for item in fields(GenerationOptions)}


def kernels_option(default: str) -> Callable[..., Any]:
    """`--kernels`; "auto" is for commands that run a model on a device."""
    text = "What computes the token mixers: triton, torch or reference."
    if default == "auto":
        text = "What computes the token mixers: triton, torch, reference, or auto (triton on CUDA, torch elsewhere)."
    return click.option("--kernels", default=default, show_default=True, metavar="NAME", help=text)


def plugin_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--plugin`, `--pass`: passes of others."""
    for option in reversed((
        click.option(
            "--plugin", "plugins", multiple=True, metavar="FILE.py",
            help="A Python file that defines passes; its code runs. Repeat for more. Installed plugins need no option.",
        ),
        click.option(
            "--pass", "passes", multiple=True, metavar="'NAME(OPTION=VALUE)'",
            help="Add a plugin's pass at the latest place that its requirements allow; NAME(...)@after:OTHER pins it. "
            "Repeat for more. `flarec passes` lists them.",
        ),
    )):  # fmt: skip
        command = option(command)
    return command


def runtime_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--device`, `--dtype`, `--kernels`: where and in what a model computes."""
    for option in reversed((
        click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1 ..."),
        click.option(
            "--dtype", metavar="NAME", help="float32, bfloat16, float16. Default: float32 on the CPU, else as stored."
        ),
        kernels_option("auto"),
    )):
        command = option(command)
    return command


def generation_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options made from these fields of `GenerationOptions`: their names, types, defaults and documentation."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for item in reversed([_FIELDS[name] for name in names]):
            hint = field_type(item.name)
            several = get_origin(hint) is tuple
            command = click.option(
                f"--{item.name.replace('_', '-')}",
                type=click.Choice(get_args(hint)) if get_origin(hint) is Literal else str if several else hint,
                default=item.default,
                show_default=item.default is not None and not several,
                multiple=several,
                metavar=item.metadata["metavar"],
                help=item.metadata["doc"],
            )(command)
        return command

    return add


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
    )):  # fmt: skip
        command = option(command)
    return command
