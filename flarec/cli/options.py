"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

MODES = ("ar-trust", "diffusion-trust", "causal")


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


def decode_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--mode`, `--threshold`, `--drafts`: how tokens are decoded."""
    for option in reversed((
        click.option(
            "--mode", type=click.Choice(MODES), help="Default: ar-trust, or causal for a model that is not converted."
        ),
        click.option(
            "--threshold", type=float, metavar="P",
            help="diffusion-trust: commit every position this confident. Default: the checkpoint's.",
        ),
        click.option(
            "--drafts", type=click.Choice(("branches", "single")),
            help="ar-trust: a draft block per possible accepted length, or one. Default: the checkpoint's.",
        ),
    )):  # fmt: skip
        command = option(command)
    return command


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
