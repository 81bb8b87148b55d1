"""Opening a model for a command: imports and weights, as quickly as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flarec.collector import collector_paused

if TYPE_CHECKING:
    from flarec.api import Model


def check_files(checkpoint: str, adapter: Path | None = None) -> None:
    """Raise `CheckpointError` unless all files of a checkpoint, or of a model's adapter, are as they were written."""
    from flarec.checkpoint.directory import open_checkpoint

    open_checkpoint(checkpoint, whole=True, adapter=adapter)


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
    adapter: Path | None = None,
) -> Model:
    """`flarec.load`, imported here: a command calls this once it knows its arguments to be right."""
    with collector_paused():
        from flarec.api import load

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
            adapter=adapter,
        )
