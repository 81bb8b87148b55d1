"""Writing a checkpoint that is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import platform
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from ..base.files import flush_tree
from ..base.hashes import FileEntry
from ..base.lock import OutputLock, held
from ..errors import CheckpointError, UsageError, first_line
from ..frontend.loading import read_config
from ..frontend.source.ties import TIE
from .adapter import FOLDER, place_source, write_adapter
from .card import model_card
from .carried import Carried
from .ends import state_ends
from .horizon import place_checkpoint
from .location import has_template
from .manifest import NAME as MANIFEST
from .manifest import Manifest
from .own import check_destination
from .place import Place, recover
from .stated import state
from .tables import CONFIG, GENERATION_CONFIG, read_table, write_table
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
    ends: Sequence[int] = (),
    attachments: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    lock: OutputLock | None = None,
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
    ends            ids that end a text, that of the training data first: stated alike in all files; none: as they are
    attachments     further files to copy: name in the checkpoint -> file
    overwrite       replace a checkpoint that flarec wrote, after everything has been written
    lock            on `out`, if the caller holds it

    Returns `out`. Raises `CheckpointError` if `out` is in the way or cannot be written, `UsageError` if another
    process is writing it.
    """
    def fill(partial: Path) -> str | None:
        tokenizer.save_pretrained(str(partial))
        if carried is None:
            save_model(partial, model, dtype, max_shard_size)
        else:
            _save_text_model(partial, model, carried)
        _suppress_mask(partial, manifest)
        state(partial, manifest, model.config)
        if ends:
            state_ends(partial, ends, tokenizer.convert_ids_to_tokens(ends[0]))
        if extra:
            _save_extra(partial, extra, dtype)
        return carried.describe() if carried else None

    return _build(Path(out), manifest, fill, bool(tokenizer.chat_template), attachments, overwrite, lock)


def write_adapter_checkpoint(
    out: str | Path,
    source: Path,
    manifest: Manifest,
    extra: Mapping[str, nn.Parameter],
    *,
    link: bool = False,
    carried: Carried | None = None,
    attachments: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    lock: OutputLock | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a checkpoint with an adapter: the source's own files, byte for byte, and `adapter/`.

    source    the directory of the source; with `manifest.adapter.alone` nothing of it is written
    extra     the adapter, and parameters without a place in the model
    link      the weight files are hard links to the source's; copies where that cannot be, as `note` is told
    The rest is that of `write_checkpoint`.
    """
    assert manifest.adapter is not None
    info = manifest.adapter

    def fill(partial: Path) -> str | None:
        if not info.alone:
            place_source(source, partial, link=link, note=note)
        write_adapter(partial / FOLDER, extra, info, manifest.source.name)
        return carried.describe(adapter=True) if carried else None

    return _build(Path(out), manifest, fill, has_template(source), attachments, overwrite, lock)


def write_horizon_checkpoint(
    out: str | Path,
    home: Path,
    source: Path,
    manifest: Manifest,
    parameters: Mapping[str, Tensor],
    *,
    link: bool = False,
    carried: Carried | None = None,
    overwrite: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the checkpoint in `home` once more, byte for byte, with a horizon head.

    source      the directory of its model and tokenizer: `home`, where that is no adapter alone
    manifest    `checkpoint.horizon.manifest_with` made it of that of `home`
    parameters  of the head
    The rest is that of `write_adapter_checkpoint`.
    """
    def fill(partial: Path) -> str | None:
        place_checkpoint(home, manifest, parameters, partial, link=link, note=note)
        return carried.describe(adapter=manifest.adapter is not None) if carried else None

    return _build(Path(out), manifest, fill, has_template(source), None, overwrite, None)


def _build(
    out: Path,
    manifest: Manifest,
    fill: Callable[[Path], str | None],
    chat: bool,
    attachments: Mapping[str, Path] | None,
    overwrite: bool,
    lock: OutputLock | None,
) -> Path:
    """`fill` a folder with the model's files, add ours, and put it into its place. `fill` returns what its multimodal
    source carries, for the card; chat: it has a chat template."""
    with _disk_errors(out), held(out, lock) as lock:
        recover(out, lock)
        check_destination(out, overwrite)
        place = Place(out, lock)
        partial = place.folder
        try:
            place.make()
            carried = fill(partial)
            for name, path in (attachments or {}).items():
                shutil.copyfile(path, partial / name)
            (partial / "custom_generate").mkdir()
            template = files("flarec.checkpoint").joinpath("templates", "generate.py").read_bytes()
            (partial / "custom_generate" / "generate.py").write_bytes(template)
            manifest = replace(manifest, versions=manifest.versions or versions())
            (partial / "README.md").write_text(model_card(manifest, out.name, carried, chat), encoding="utf-8")
            names = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
            entries = {name: FileEntry.of(partial / name) for name in names}
            (partial / MANIFEST).write_text(replace(manifest, files=entries).to_json(), encoding="utf-8")
            for name in names:  # safetensors writes files that nobody else may read
                if (partial / name).stat().st_nlink == 1:  # a link's mode is the source's
                    (partial / name).chmod((partial / MANIFEST).stat().st_mode)
            flush_tree(partial)  # before the rename: else a power cut could leave a name without contents
            check_destination(out, overwrite, building=partial)  # again: writing took its time
            place.take()
        finally:
            place.clear()
    return out


def clear_left_overs(out: Path, lock: OutputLock) -> None:
    """Remove or finish what a killed process left of a checkpoint. Raises `CheckpointError` if that cannot be done."""
    try:
        recover(out, lock)
    except OSError as error:
        raise CheckpointError(f"what a killed run left of {out} cannot be removed ({error.strerror})") from error


def save_model(
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
    write_table(directory / CONFIG, {**read_table(directory / CONFIG), "dtype": stored})


def _save_text_model(directory: Path, model: Any, carried: Carried) -> None:
    """The source's files with the weights of `model` in them, which are saved on their own for a moment."""
    saved = directory / "text"
    saved.mkdir()
    save_model(saved, model, None, MAX_SHARD_SIZE)
    carried.write(directory, saved, model.state_dict())
    shutil.rmtree(saved)
    tied = bool(model.config.tie_word_embeddings)
    if bool(getattr(read_config(directory), TIE, tied)) != tied:  # what the files hold decides: say so to transformers
        table = read_table(directory / CONFIG)
        inner = {**table.get("text_config", {}), TIE: tied}
        write_table(directory / CONFIG, {**table, TIE: tied, "text_config": inner})


def _suppress_mask(directory: Path, manifest: Manifest) -> None:
    """Plain transformers does not generate the mask token either."""
    if manifest.mask.kind == "row":
        path = directory / GENERATION_CONFIG
        table = read_table(path)
        known = table.get("suppress_tokens") or ()
        write_table(path, {**table, "suppress_tokens": sorted({*known, manifest.mask.token_id})})


def _save_extra(
    directory: Path, extra: Mapping[str, nn.Parameter], dtype: torch.dtype | Mapping[str, torch.dtype] | None
) -> None:
    state = {name: parameter.detach() for name, parameter in extra.items()}
    usual = Counter(dtype.values()).most_common(1)[0][0] if isinstance(dtype, Mapping) and dtype else dtype
    one = usual if isinstance(usual, torch.dtype) else None
    save_file({name: tensor.contiguous() for name, tensor in cast(state, one).items()}, directory / EXTRA)


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
