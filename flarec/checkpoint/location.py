"""Where a model directory is: a local one, or the snapshot of a hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError, first_line
from .tables import CONFIG

PARTIAL = ".partial"
"""A run that is not finished keeps its state in OUT.partial, with its record in `RUN`."""
RUN = "run.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def has_template(folder: Path) -> bool:
    """Whether the files of a tokenizer hold a chat template."""
    if (folder / "chat_template.jinja").exists() or (folder / "additional_chat_templates").exists():
        return True
    return any(
        '"chat_template"' in (folder / name).read_text(encoding="utf-8", errors="replace")
        for name in ("tokenizer_config.json", "chat_template.json")
        if (folder / name).is_file()
    )


def _is_run(partial: str) -> bool:
    """Whether it is a run's state, and no model that is called so."""
    return os.path.isfile(os.path.join(partial, RUN)) and not os.path.exists(os.path.join(partial, CONFIG))


def _unfinished(partial: str | Path) -> str:
    """What is said of a run's state where a checkpoint is asked for."""
    return (
        f"{partial} holds a run that is not finished: go on with flarec convert ... --resume, or write its checkpoint "
        f"as it is with flarec finish {partial}"
    )


def resolve(path: str | Path) -> Path:
    """A local directory as it is; a hub id becomes the directory of its downloaded snapshot."""
    directory = Path(path)
    if os.path.isdir(directory):  # unlike Path.is_dir without an error for what is too long to be a path
        if directory.name.endswith(PARTIAL) and _is_run(str(directory)):
            raise CheckpointError(_unfinished(directory))
        return directory
    if os.path.exists(directory):
        raise CheckpointError(f"{directory} is a file, not a model directory; give the directory that holds it")
    if _is_run(partial := f"{directory}{PARTIAL}"):
        raise CheckpointError(f"{path} does not exist; {_unfinished(partial)}")
    if not HUB_ID.fullmatch(str(path)):
        raise CheckpointError(f"{path} does not exist; give a checkpoint or model directory, or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx"]))
    except (OSError, ValueError) as error:  # hub errors are one or the other
        raise CheckpointError(
            f"{path} is no local directory and could not be fetched from the hub: {first_line(error)}"
        ) from error
