"""Opening a model for a command: imports and weights, as quickly as they come."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flarec.collector import collector_paused
from flarec.errors import FlarecWarning

if TYPE_CHECKING:
    from flarec.api import Model
    from flarec.base.generation import GenerationOptions


def check_files(checkpoint: str, adapter: Path | None = None) -> None:
    """Raise `CheckpointError` unless all files of a checkpoint, or of a model's adapter, are as they were written."""
    from flarec.checkpoint.directory import open_checkpoint

    open_checkpoint(checkpoint, whole=True, adapter=adapter)


def say_unread(options: GenerationOptions, mode: str) -> None:
    """Warn of options that decoding in this mode does not read."""
    for name in options.unread(mode):
        warnings.warn(f"--{name.replace('_', '-')} does nothing in mode {mode}", FlarecWarning, stacklevel=2)


def open_model(
    checkpoint: str,
    *,
    dtype: str | None,
    device: str,
    kernels: str,
    mask_token_id: int | None,
    block_size: int | None,
    passes: Sequence[str] = (),
    plugins: Sequence[str] = (),
    graphs: str = "auto",
    compile: str = "auto",
    adapter: Path | None = None,
    mode: str | None = None,
    chat: bool = False,
) -> Model:
    """`flarec.load`, imported here: a command calls this once it knows its arguments to be right.

    mode, chat: what the command needs; a model without it is refused by its small files, before the slow part.
    """
    with collector_paused():
        from flarec.api import check_mode, load
        from flarec.checkpoint.directory import open_checkpoint
        from flarec.checkpoint.location import has_template
        from flarec.decode.tokenizing import encode_prompt

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FlarecWarning)  # `load` says it
            small = open_checkpoint(checkpoint, mask_token_id=mask_token_id, block_size=block_size, adapter=adapter)
        check_mode(mode, small.manifest)
        if chat and not has_template(small.path):
            encode_prompt(small.load_tokenizer(), "", chat=True)  # its class may have a template of its own
        return load(
            checkpoint,
            dtype=dtype,
            device=device,
            kernels=kernels,
            mask_token_id=mask_token_id,
            block_size=block_size,
            passes=passes,
            plugins=plugins,
            graphs=graphs,
            compile=compile,
            adapter=adapter,
        )
