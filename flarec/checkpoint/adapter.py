"""The adapter of a checkpoint on disk, in peft's layout, and the directory around it: the source's own files.

    adapter/adapter_config.json         peft's configuration, with a mark of ours
    adapter/adapter_model.safetensors   `base_model.model.MODULE.lora_A.weight`, `... .lora_B.weight`
    adapter/flarec.safetensors          what peft has no place for: the mask vector

It lies in a folder of its own because transformers and peft load what lies beside a model: on all rows, where this one
acts on noisy rows only (docs/semantics.md section 6).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.hashes import sha256_of
from ..errors import CheckpointError, first_line
from ..frontend.source.headers import INDEX
from .carried import FILE_KINDS
from .manifest import NAME as MANIFEST
from .manifest import AdapterInfo, Manifest
from .weights import EXTRA, weight_files

FOLDER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = (".lora_A.weight", ".lora_B.weight")
MARK = "flarec_noisy_rows_only"
"""The key of our mark in peft's configuration: peft opens the adapter all the same, and warns with this name."""
NOISY_ROWS_ONLY = (
    "this adapter acts on the noisy rows of a block-diffusion program only; on all rows, as peft and a merge apply it, "
    "it ruins the model's own text"
)
_TEXTS = ("LICENSE", "LICENCE", "NOTICE")
_NOT_COPIED = (MANIFEST, CONFIG)


def write_adapter(folder: Path, extra: Mapping[str, Tensor], info: AdapterInfo, source: str) -> None:
    """Write the three files into `folder`, which is made. source: the model's name, for peft's configuration."""
    folder.mkdir()
    tensors = {name: value.detach().cpu().contiguous() for name, value in extra.items()}
    adapter = {f"{PREFIX}{name}": value for name, value in tensors.items() if name.endswith(PARTS)}
    rest = {name: value for name, value in tensors.items() if not name.endswith(PARTS)}
    modules = sorted({name.removeprefix(PREFIX).removesuffix(part) for name in adapter for part in PARTS
                      if name.endswith(part)})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "r": info.rank,
        "lora_alpha": info.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
        MARK: NOISY_ROWS_ONLY,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file(adapter, folder / WEIGHTS, metadata={"format": "pt"})
    if rest:
        save_file(rest, folder / EXTRA)


def read_adapter(folder: Path, dtype: torch.dtype | None, device: torch.device | str) -> dict[str, Tensor]:
    """Everything that `write_adapter` was given, by its names. Raises `CheckpointError`."""
    found: dict[str, Tensor] = {}
    for path in (folder / WEIGHTS, folder / EXTRA):
        if path.name == EXTRA and not path.is_file():
            continue
        try:
            tensors = load_file(path, device=str(device))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}; copy the adapter again") from error
        found |= {name.removeprefix(PREFIX): value.to(dtype or value.dtype) for name, value in tensors.items()}
    return found


def place_source(source: Path, out: Path, *, link: bool, note: Callable[[str], None]) -> None:
    """Put the source's own files into `out`: weights, configuration, tokenizer, licence; not its model card.

    link: weight files are hard links; copies, and `note` is told, where the file system has none or is another one.
    """
    weights = weight_files(source)
    for path in weights:
        target = out / path.name
        if not (link and linked(path, target, note)):
            shutil.copyfile(path, target)
    for path in sorted(source.iterdir()):
        known = path.suffix in FILE_KINDS or path.name.upper().startswith(_TEXTS)
        foreign_index = path.name.endswith(".index.json") and path.name != INDEX
        if path.is_file() and known and not foreign_index and path.name not in _NOT_COPIED:
            shutil.copyfile(path, out / path.name)


def linked(path: Path, target: Path, note: Callable[[str], None]) -> bool:
    """Whether `target` is a hard link to a file now; where that cannot be, `note` is told."""
    try:
        os.link(os.path.realpath(path), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES):
            raise
        note(f"{path.name} is copied: it cannot be linked into {target.parent.parent} ({error.strerror})")
        return False
    return True


def open_adapter(directory: Path, *, whole: bool = False) -> Manifest:
    """The manifest of a directory with an adapter, whose files are checked (`Manifest.check_files`).

    Raises `CheckpointError`.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist; give the directory that `flarec convert` wrote")
    manifest = Manifest.read(directory)
    if manifest is None or manifest.adapter is None:
        raise CheckpointError(
            f"{directory} holds no adapter of flarec (no {MANIFEST} that names one); give what `flarec convert` wrote"
        )
    manifest.check_files(directory, whole=whole)
    return manifest


def check_source(source: Path, manifest: Manifest, adapter: Path) -> None:
    """Raise `CheckpointError` if an adapter was not made for the model in `source`: its weight files are hashed."""
    weights = weight_files(source)
    if not weights or sha256_of(*weights) != manifest.source.sha256:
        raise CheckpointError(
            f"{source} is not the model that the adapter in {adapter} was made for: that is {manifest.source.name}, "
            f"whose weight files have the hash {str(manifest.source.sha256)[:12]}...; give that model"
        )


def refuse_bare_adapter(directory: Path) -> None:
    """Raise `CheckpointError` with what to do if a directory holds an adapter and no model."""
    manifest = Manifest.read(directory)
    if manifest is not None and manifest.adapter is not None:
        raise CheckpointError(
            f"{directory} holds an adapter without its model; give the model ({manifest.source.name}) and "
            f"--adapter {directory}"
        )
    refuse_noisy_adapter(directory)
    if config := _read_json(directory / CONFIG):
        base = config.get("base_model_name_or_path") or "MODEL"
        raise CheckpointError(
            f"{directory} is an adapter of peft, not a model; give its model and the adapter: flarec convert {base} "
            f"--merge-adapter {directory}"
        )


def refuse_noisy_adapter(directory: Path) -> None:
    """Raise `CheckpointError` for an adapter of ours, which must not be merged."""
    if MARK in _read_json(directory / CONFIG):
        raise CheckpointError(
            f"{directory} is a noise-row adapter of flarec and cannot be merged into a model: {NOISY_ROWS_ONLY}; open "
            f"its model with --adapter {directory.resolve().parent}"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}
