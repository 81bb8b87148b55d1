"""What surrounds the text model of a multimodal checkpoint, carried over untouched into the converted one.

The new checkpoint has the source's own files: the same configuration, the same weight files with the same tensor names
and dtypes, the processor's files. Only the text model's tensors have new values, so transformers opens it as the same
multimodal class, and tensors that transformers itself drops (multi-token prediction) are still there.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..frontend.loading import text_name
from .tables import CONFIG, read_table

FILE_KINDS = (".json", ".jinja", ".txt", ".model")
"""Suffixes of configuration, processor and tokenizer files."""
_NOT_COPIED = ("flarec.json", ".bin.index.json")


@dataclass(frozen=True)
class Carried:
    """A multimodal checkpoint whose text model is converted.

    directory   the source
    weights     its weight files
    names       tensors in them that are not the text model's
    text_names  tensors that are
    """

    directory: Path
    weights: tuple[Path, ...]
    names: tuple[str, ...]
    text_names: tuple[str, ...]

    @staticmethod
    def of(directory: Path, weights: Sequence[Path], live: Iterable[str]) -> Carried:
        """`live`: names in the state dict of the text model. Raises `CheckpointError` without weights to carry over."""
        if not weights:
            raise CheckpointError(f"{directory} has no weights in safetensors files; save the model again with them")
        own = set(live)
        names = [name for file in weights for name in _names(file)]
        text = {name for name in names if text_name(name) != name or name in own}
        rest = tuple(name for name in names if name not in text)
        return Carried(directory, tuple(weights), rest, tuple(sorted(text)))

    @property
    def architecture(self) -> str:
        """The class that opens the checkpoint."""
        table = read_table(self.directory / CONFIG)
        return str((table.get("architectures") or [table.get("model_type")])[0])

    def files(self) -> list[Path]:
        """What is copied beside the weights: everything but the model card, which is the converted model's own."""
        found = (path for path in self.directory.iterdir() if path.is_file() and path.suffix in FILE_KINDS)
        return sorted(path for path in found if not path.name.endswith(_NOT_COPIED))

    def describe(self, *, adapter: bool = False) -> str:
        """One line for people. adapter: nothing is converted, the text model has an adapter."""
        parts = Counter(_part(name) for name in self.names)
        tensors = ", ".join(f"{name} {count}" for name, count in sorted(parts.items()))
        others = [path.name for path in self.files() if "processor" in path.name]
        untouched = ", ".join([f"{len(self.names)} tensors ({tensors})", *others])
        if adapter:
            return f"{self.architecture}: the text model has the adapter; every tensor is the source's own"
        converted = f"the text model is converted ({len(self.text_names)} tensors)"
        return f"{self.architecture}: {converted}; carried over untouched: {untouched}"

    def write(self, out: Path, saved: Path, live: Mapping[str, Tensor]) -> None:
        """Fill `out` with the source's files, the text model's tensors replaced. Raises `CheckpointError`.

        saved  directory with the converted text model as its `save_pretrained` writes it after `load_model`:
               transformers undoes the renaming, merging and splitting of loading, so tensors have the source's names
        live   the text model's state dict, for tensors that the source stores although they are tied
        """
        with ExitStack() as stack:
            converted: dict[str, Any] = {}
            for file in sorted(saved.glob("*.safetensors")):
                opened = stack.enter_context(safe_open(file, framework="pt"))
                converted.update(dict.fromkeys(opened.keys(), opened))
            lost = sorted(converted.keys() - set(self.text_names))
            stale = [name for name in self.text_names if name not in converted and text_name(name) not in live]
            for name in [*lost, *stale]:
                raise CheckpointError(
                    f"{name} is only in {'the converted weights' if name in converted else self.directory}, so that "
                    "they cannot be put together; save the source with this version of transformers and convert that"
                )
            for file in self.weights:
                self._write_weights(file, out / file.name, converted, live)
        if not (self.directory / "generation_config.json").is_file():
            shutil.copyfile(saved / "generation_config.json", out / "generation_config.json")
        for path in self.files():
            shutil.copyfile(path, out / path.name)

    def _write_weights(self, file: Path, out: Path, converted: Mapping[str, Any], live: Mapping[str, Tensor]) -> None:
        text, tensors = set(self.text_names), {}
        with safe_open(file, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118 - not a mapping
                old: Tensor = source.get_tensor(name)
                if name in text:
                    new = converted[name].get_tensor(name) if name in converted else live[text_name(name)].detach()
                    assert new.shape == old.shape, f"{name}: {list(old.shape)} became {list(new.shape)}"
                    old = new.to(device="cpu", dtype=old.dtype, copy=True)
                tensors[name] = old
            metadata = source.metadata()
        save_file(tensors, out, metadata=metadata)


def _names(file: Path) -> Iterator[str]:
    with safe_open(file, framework="pt") as opened:
        yield from opened.keys()


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to: of `model.visual.blocks.0.x`, `visual`."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "model" and len(pieces) > 1 else pieces[0]
