"""Writing a checkpoint that is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .. import __version__
from ..base.files import flush, flush_tree, unused
from ..base.hashes import FileEntry
from ..errors import CheckpointError, UsageError, first_line
from .card import model_card
from .carried import Carried
from .directory import GENERATION_CONFIG
from .manifest import NAME as MANIFEST
from .manifest import Manifest
from .weights import EXTRA, cast

MAX_SHARD_SIZE = "50GB"
"""As transformers has it."""


def versions() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    import transformers

    return {
        "flarec": __version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "python": platform.python_version(),
    }


def check_destination(out: Path, overwrite: bool) -> None:
    """Raises `CheckpointError` if a checkpoint cannot be written to `out`; writes nothing.

    Only a checkpoint of flarec is ever replaced: a folder with a manifest, and with no other files than it lists.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise CheckpointError(f"{out} exists and is not a directory; choose another output directory")
    if not out.is_dir():
        return
    try:
        reason = why_not_own(out) if any(out.iterdir()) else None
    except OSError as error:
        raise CheckpointError(f"{out} cannot be read ({error.strerror}); choose another output directory") from error
    if reason is None:
        return
    if reason and overwrite:
        raise CheckpointError(
            f"{out} is not replaced by --overwrite: {reason}; move it away or choose another output directory"
        )
    if not overwrite:
        hint = "" if reason else " or replace it with --overwrite"
        raise CheckpointError(f"{out} is not empty; choose another output directory{hint}")


def why_not_own(directory: Path) -> str:
    """Why a directory is no checkpoint that flarec wrote, and nothing else; empty if it is one."""
    path = directory / MANIFEST
    try:
        manifest = None if path.is_symlink() else Manifest.read(directory)
    except CheckpointError as error:
        return str(error)
    if manifest is None:
        return f"it is no checkpoint of flarec (no {MANIFEST})"
    own = {MANIFEST, *manifest.files}
    folders = {parent.as_posix() for name in own for parent in Path(name).parents}
    for found in sorted(directory.rglob("*")):
        name = found.relative_to(directory).as_posix()
        if found.is_symlink() or name not in (folders if found.is_dir() else own):
            return f"{name} in it was not written by flarec"
    return ""


def check_shard_size(size: str) -> None:
    """Raises `UsageError` for a size of weight files that transformers would not understand."""
    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B", size.strip().upper()):
        raise UsageError(f"shard size '{size}' is unknown; give a size such as 5GB or 500MB")


def write_checkpoint(
    out: str | Path,
    model: Any,
    tokenizer: Any,
    manifest: Manifest,
    extra: Mapping[str, nn.Parameter] | None = None,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    carried: Carried | None = None,
    attachments: Mapping[str, Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint to the directory `out`: it appears complete, or the disk is as it was before.

    model           transformers model; not changed, whatever its dtype
    tokenizer       transformers tokenizer, saved with its chat template
    manifest        `files`, and `versions` if empty, are filled in here
    extra           parameters without a place in the model (`Program.extra`)
    dtype           dtype on disk: one, or one per tensor name (`stored_dtypes` of the source); default: the live ones
    max_shard_size  of a weight file, in bytes or as "5GB": more weights are split into several files and an index
    carried         the multimodal checkpoint that `model` was loaded from (`Checkpoint.carried`): it is written with
                    `model` as its text model, in the source's own files and dtypes
    attachments     further files to copy: name in the checkpoint -> file
    overwrite       replace a checkpoint that flarec wrote, after everything has been written

    Returns `out`. Raises `CheckpointError` if `out` is in the way or cannot be written.
    """
    out = Path(out)
    check_destination(out, overwrite)
    # a sibling, so that the rename stays on one file system
    with _disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = unused(out, "writing")
        partial.mkdir()
    try:
        with _disk_errors(out):
            tokenizer.save_pretrained(str(partial))
            if carried is None:
                _save_model(partial, model, dtype, max_shard_size)
            else:
                _save_text_model(partial, model, carried)
            _suppress_mask(partial, manifest)
            if extra:
                _save_extra(partial, extra, dtype)
            for name, path in (attachments or {}).items():
                shutil.copyfile(path, partial / name)
            (partial / "custom_generate").mkdir()
            template = files("flarec.checkpoint").joinpath("templates", "generate.py").read_bytes()
            (partial / "custom_generate" / "generate.py").write_bytes(template)
            manifest = replace(manifest, versions=manifest.versions or versions())
            card = model_card(manifest, out.name, carried.describe() if carried else None)
            (partial / "README.md").write_text(card, encoding="utf-8")
            names = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
            entries = {name: FileEntry.of(partial / name) for name in names}
            (partial / MANIFEST).write_text(replace(manifest, files=entries).to_json(), encoding="utf-8")
            for name in names:  # safetensors writes files that nobody else may read
                (partial / name).chmod((partial / MANIFEST).stat().st_mode)
            flush_tree(partial)  # before the rename: else a power cut could leave a name without contents
            check_destination(out, overwrite)  # again: writing took its time
            _move_into_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _save_model(
    directory: Path, model: Any, dtype: torch.dtype | Mapping[str, torch.dtype] | None, max_shard_size: str | int
) -> None:
    """Weights and configurations. transformers notes the live dtype in the configuration; the stored one counts."""
    config = model.config
    before = (config.dtype, config.architectures)
    state = cast(model.state_dict(), dtype)
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    try:
        model.save_pretrained(str(directory), state_dict=state, max_shard_size=max_shard_size)
    finally:
        config.dtype, config.architectures = before
    stored = str(sizes.most_common(1)[0][0]).removeprefix("torch.")
    _edit_json(directory / "config.json", {"dtype": stored})


def _save_text_model(directory: Path, model: Any, carried: Carried) -> None:
    """The source's files with the weights of `model` in them, which are saved on their own for a moment."""
    saved = directory / "text"
    saved.mkdir()
    _save_model(saved, model, None, MAX_SHARD_SIZE)
    carried.write(directory, saved, model.state_dict())
    shutil.rmtree(saved)


def _suppress_mask(directory: Path, manifest: Manifest) -> None:
    """Plain transformers does not generate the mask token either."""
    if manifest.mask.kind == "row":
        path = directory / GENERATION_CONFIG
        known = json.loads(path.read_text(encoding="utf-8")).get("suppress_tokens") if path.is_file() else None
        _edit_json(path, {"suppress_tokens": sorted({*(known or []), manifest.mask.token_id})})


def _save_extra(
    directory: Path, extra: Mapping[str, nn.Parameter], dtype: torch.dtype | Mapping[str, torch.dtype] | None
) -> None:
    state = {name: parameter.detach() for name, parameter in extra.items()}
    usual = Counter(dtype.values()).most_common(1)[0][0] if isinstance(dtype, Mapping) and dtype else dtype
    one = usual if isinstance(usual, torch.dtype) else None
    save_file({name: tensor.contiguous() for name, tensor in cast(state, one).items()}, directory / EXTRA)


def _edit_json(path: Path, values: Mapping[str, Any]) -> None:
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**table, **values}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _move_into_place(partial: Path, out: Path) -> None:
    old = unused(out, "replaced")
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(partial, out)
    except OSError:
        if old.exists():
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):  # the checkpoint is in its place, whatever the disk says
        flush(out.parent)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Failures of the file system as `CheckpointError`. The Rust writers raise classes of their own."""
    try:
        yield
    except Exception as error:
        text = first_line(error)
        full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or f"os error {errno.ENOSPC}" in text
        if full:
            raise CheckpointError(
                f"the disk is full: {out} was not written (nothing is left behind); free some space and run again"
            ) from error
        if isinstance(error, OSError) or "os error" in text:
            raise CheckpointError(f"{out} cannot be written ({text}); nothing is left behind") from error
        raise
