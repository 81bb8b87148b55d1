"""From what a user names to a model without weights: a directory, a configuration file, or a hub id."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from flarec.checkpoint.location import HUB_ID
from flarec.errors import UsageError
from flarec.frontend.families import FAMILIES, family_of
from flarec.frontend.loading import is_wrapper, read_config
from flarec.frontend.source.gguf import without_gguf
from flarec.inspect.summary import Summary

from .report import Anatomy

CONFIG = "config.json"
PLAIN = ("softmax",)  # mixers of what has no row


@contextlib.contextmanager
def located(source: str, gguf: str | None = None) -> Iterator[str]:
    """What `load_model` opens for a source; of a GGUF file its configuration alone.

    Raises `UsageError` if there is nothing of that name, or a file that transformers does not read.
    """
    with without_gguf(source, gguf) as location, _located(location) as opened:
        yield opened


@contextlib.contextmanager
def _located(source: str) -> Iterator[str]:
    path = Path(source)
    if path.is_file():
        if path.name == CONFIG:
            yield str(path.parent)
            return
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(path, Path(folder) / CONFIG)
            yield folder
        return
    if path.is_dir() and not (path / CONFIG).is_file():
        raise UsageError(f"{path} holds no {CONFIG}; give a model directory, a configuration file or a hub id")
    if not path.exists() and not HUB_ID.fullmatch(source):
        raise UsageError(f"{path} does not exist; give a model directory, a configuration file or a hub id")
    yield source


def wrapper_of(location: str) -> str:
    """The multimodal model around the text model that is opened; empty if there is none."""
    config = read_config(location)
    names = getattr(config, "architectures", None) or [type(config).__name__]
    return str(names[0]) if is_wrapper(config) else ""


def anatomy(model: nn.Module, summary: Summary | None, wrapper: str) -> Anatomy:
    """What the model is made of: the mixers of its program, or the modules of its layers if it was not captured."""
    config: Any = model.config
    row = family_of(config)
    parts: Counter[str] = Counter()
    if summary is not None:
        for group in summary.groups:
            mixers = Counter(f"{mixer.kind}{_options(mixer.options)}" for mixer in group.mixers)
            text = ", ".join(f"{n} x {name}" if n > 1 else name for name, n in mixers.items())
            parts[f"{group.cls}: {text}"] += len(group.layers)
    else:
        layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList)), ())
        for layer in layers:
            children = ", ".join(type(child).__name__ for child in layer.children())
            parts[f"{type(layer).__name__}: {children}"] += 1
    return Anatomy(
        model=type(model).__name__,
        wrapper=wrapper,
        family=row.model_type,
        known_family=row.model_type in FAMILIES or row.mixers != PLAIN,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=tuple(parts.items()),
        vocab_size=int(config.get_text_config().vocab_size),
    )


def _options(options: tuple[str, ...]) -> str:
    kept = [option for option in options if not option.startswith("scale ")]
    return f" ({', '.join(kept)})" if kept else ""
